"""Reads the status of runs: from their folders, and from one look at each scheduler."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hpcft.core.errors import ClusterError, StoreError
from hpcft.core.files import R, file_age_s, is_locked, read_record_if_exists
from hpcft.core.paths import RunPaths
from hpcft.core.records import Attempt, Job, Plan, Progress, Recovery, RunRecord
from hpcft.core.run_index import FoundRun
from hpcft.recovery.diagnosis import Failure, explain_failure, held_reason
from hpcft.recovery.log import fallbacks, read_recoveries
from hpcft.scheduler import scheduler_named
from hpcft.scheduler.job_state import COMPLETED, PENDING, UNKNOWN, JobState
from hpcft.scheduler.protocol import Scheduler

HEARTBEAT_FRESH_S = 60.0
"""Age in seconds up to which a heartbeat shows that its run is alive. A run writes one every few
seconds; a shared file system may show it half a minute later."""
RESULT_GRACE_S = 20.0
"""Seconds after the end of a job in which its result may still be on its way to this machine."""
_JOB_ID = re.compile(r"[0-9]{1,10}(_[0-9]{1,10})?")


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """Everything known about a run at one moment."""

    paths: RunPaths
    """Files of the run folder."""
    job: Job
    """The job record; if it cannot be read, a placeholder that holds only the folders' names."""
    state: str
    """PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, TIMEOUT …; UNKNOWN if it is not known."""
    note: str = ""
    """Why the run is pending, failed or unknown, and which of its files are damaged."""
    job_id: str = ""
    """Id of the latest job; empty if the run has none."""
    nodes: str = ""
    """Nodes of the latest job."""
    elapsed_s: float | None = None
    """Seconds that the run took, or that its latest job has run so far."""
    progress: Progress | None = None
    """The latest heartbeat."""
    record: RunRecord | None = None
    """The result; None before the run has completed."""
    plan: Plan | None = None
    """The plan that runs now."""
    recoveries: tuple[Recovery, ...] = ()
    """Recoveries so far, the first one first."""
    failure: Failure | None = None
    """Why the run failed, or is held; None if it did not, or if the cause is not known."""
    damage: str = ""
    """Why job.json or result.json cannot be read; empty if both can."""
    job_ended: bool = False
    """Whether the latest job is known to have ended, with success or not."""

    @property
    def attempt(self) -> Attempt:
        """The latest attempt, with its job id even if job.json lacks it."""
        return self.job.attempts[-1].model_copy(update={"job_id": self.job_id or None})

    @property
    def fallbacks(self) -> list[Recovery]:
        """Recoveries that changed the layout because memory ran out."""
        return fallbacks(self.recoveries)

    @property
    def is_live(self) -> bool:
        """Whether the run is queued or runs."""
        return self.state in ("PENDING", "RUNNING")

    @property
    def may_be_live(self) -> bool:
        """Whether the run is queued or runs, as far as it is known."""
        return self.is_live or (self.state == UNKNOWN and not self.job_ended)


def run_status(run: FoundRun, is_locked: Callable[[Path], bool] = is_locked) -> RunStatus:
    """Returns the status of one run; arguments as of `run_statuses`."""
    return run_statuses([run], is_locked)[0]


def run_statuses(
    runs: Iterable[FoundRun], is_locked: Callable[[Path], bool] = is_locked
) -> list[RunStatus]:
    """Returns the status of many runs, with one look at each scheduler.

    Args:
        runs: the runs.
        is_locked: returns whether a command is submitting from a runs folder.
    """
    folders = [_read_folder(run) for run in runs]
    jobs = _look_at_jobs(folders, is_locked)
    return [_run_status(folder, job) for folder, job in zip(folders, jobs, strict=True)]


def has_fresh_heartbeat(paths: RunPaths) -> bool:
    """Returns whether a heartbeat was written a moment ago."""
    try:
        return abs(file_age_s(paths.progress)) < HEARTBEAT_FRESH_S
    except OSError:
        return False


# ---------------------------------------------------------------- the run folder


@dataclass(frozen=True, kw_only=True)
class _Folder:
    """Records of a run folder."""

    run: FoundRun
    damage: str = ""
    """Why job.json or result.json cannot be read."""
    notes: tuple[str, ...] = ()
    """Why other files cannot be read."""
    record: RunRecord | None = None
    progress: Progress | None = None
    plan: Plan | None = None
    recoveries: tuple[Recovery, ...] | None = None
    """None if one of them cannot be read."""

    @property
    def attempt(self) -> Attempt | None:
        attempts = self.run.job.attempts
        return attempts[-1] if attempts else None


def _read_folder(run: FoundRun) -> _Folder:
    if run.damage:
        return _Folder(run=run, damage=run.damage)
    paths = run.paths
    damage: list[str] = []
    record = _read(paths.result, RunRecord, damage)
    if record and record.run_id != paths.folder.name:
        damage.append(f"{paths.result}: belongs to the run {record.run_id}")
        record = None
    notes: list[str] = []
    recoveries: tuple[Recovery, ...] | None = None
    try:
        recoveries = tuple(read_recoveries(paths))
    except StoreError as error:
        notes.append(str(error))
    progress = _read(paths.progress, Progress, notes)
    plan = _read_current_plan(paths, recoveries or (), notes)
    return _Folder(
        run=run,
        damage="; ".join(damage),
        notes=tuple(notes),
        record=record,
        progress=progress,
        plan=plan,
        recoveries=recoveries,
    )


def _read(file: Path, kind: type[R], damage: list[str]) -> R | None:
    """Reads a record; if it cannot be read, appends the reason to `damage` and returns None."""
    try:
        return read_record_if_exists(file, kind)
    except StoreError as error:
        damage.append(str(error))
        return None


def _read_current_plan(
    paths: RunPaths, recoveries: Sequence[Recovery], notes: list[str]
) -> Plan | None:
    """Reads the plan that runs now, without predictions that are of another layout."""
    before = len(notes)
    plan = _read(paths.current_plan, Plan, notes)
    if plan is None and len(notes) == before:
        plan = _read(paths.plan, Plan, notes)
    changes = fallbacks(recoveries)
    if plan is None or not changes or plan.recovery_number >= changes[-1].number:
        return plan
    # hpcft 0.1 wrote no current_plan.json, so this is the plan from before the fallback.
    layout = {"layout": changes[-1].layout, "recovery_number": changes[-1].number}
    return plan.model_copy(update={**layout, "gpu_memory": [], "host_memory": [], "time": None})


def _read_folder_again(run: FoundRun) -> _Folder:
    """Reads the folder of a run whose job may have written its last files since."""
    with contextlib.suppress(OSError):
        os.listdir(run.paths.folder)  # Has a network file system look for new files.
    return _read_folder(run)


# ---------------------------------------------------------------- the scheduler


@dataclass(frozen=True)
class _JobView:
    """The latest job of a run, as its scheduler sees it."""

    state: JobState
    job_id: str = ""


def _look_at_jobs(folders: Sequence[_Folder], is_locked: Callable[[Path], bool]) -> list[_JobView]:
    """Returns the latest job of each run; asks each scheduler once for all runs."""
    jobs: dict[Path, _JobView] = {}
    unfinished: dict[Literal["slurm", "local"], list[tuple[_Folder, Attempt]]] = {}
    for folder in folders:
        run, attempt = folder.run, folder.attempt
        if run.damage:
            jobs[run.paths.folder] = _JobView(JobState(UNKNOWN))
        elif attempt is None:
            jobs[run.paths.folder] = _JobView(JobState("FAILED", "was never submitted"))
        elif folder.record is not None:
            jobs[run.paths.folder] = _JobView(JobState(COMPLETED), attempt.job_id or "")
        else:
            unfinished.setdefault(run.job.scheduler, []).append((folder, attempt))
    for name, runs in unfinished.items():
        jobs |= _ask(scheduler_named(name), runs, is_locked)
    return [jobs[folder.run.paths.folder] for folder in folders]


def _ask(
    scheduler: Scheduler,
    runs: Sequence[tuple[_Folder, Attempt]],
    is_locked: Callable[[Path], bool],
) -> dict[Path, _JobView]:
    """Asks a scheduler for the latest job of each run; returns them by run folder."""
    attempts = [attempt for _, attempt in runs]
    missing = [index for index, attempt in enumerate(attempts) if attempt.job_id is None]
    trouble = ""
    try:
        found = scheduler.find_jobs([attempts[index] for index in missing])
        for index, job_id in zip(missing, found, strict=True):
            folder = runs[index][0]
            job_id = job_id or _job_in_folder(folder)
            # The job that is about to resubmit the run has the token of an earlier attempt.
            own = next((a for a in folder.run.job.attempts if job_id and a.job_id == job_id), None)
            update = {"job_id": job_id}
            attempts[index] = (own or attempts[index]).model_copy(update=update)
    except ClusterError as error:
        trouble = str(error)
    states = scheduler.states(attempts)
    jobs = {}
    for (folder, _), attempt, state in zip(runs, attempts, states, strict=True):
        if attempt.job_id is None and trouble:
            state = JobState(UNKNOWN, trouble)
        elif attempt.job_id is None and is_locked(folder.run.paths.folder.parents[1]):
            state = JobState("PENDING", "is being submitted")
        jobs[folder.run.paths.folder] = _JobView(state, attempt.job_id or "")
    return jobs


def _job_in_folder(folder: _Folder) -> str | None:
    """Returns the job that the run folder names, for an attempt whose job id was not recorded.

    It is the job that is about to resubmit the run, and lives until that is done; else the job that
    wrote the heartbeat, because the command that submitted it could not record its id.
    """
    last = folder.recoveries[-1] if folder.recoveries else None
    resubmitting = last.job_id if last and last.action == "resubmit" else ""
    running = folder.progress.job_id if folder.progress else ""
    # Text of a run folder becomes an argument of a command, so it has to look like an id.
    return next((job_id for job_id in (resubmitting, running) if _JOB_ID.fullmatch(job_id)), None)


# ---------------------------------------------------------------- both together


def _run_status(folder: _Folder, job: _JobView) -> RunStatus:
    if folder.record is None and not job.state.is_live:
        folder = _read_folder_again(folder.run)
    state, note, failure = _judge(folder, job)
    record, progress = folder.record, folder.progress
    return RunStatus(
        paths=folder.run.paths,
        job=folder.run.job,
        state=state,
        note="; ".join(part for part in (*folder.notes, note) if part),
        job_id=job.job_id,
        nodes=job.state.nodes or (progress.node if progress else ""),
        elapsed_s=record.measured.wall_s if record and record.measured else job.state.elapsed_s,
        progress=progress,
        record=record,
        plan=folder.plan,
        recoveries=folder.recoveries or (),
        failure=failure,
        damage=folder.damage,
        job_ended=job.state.is_over or job.state.unknown_to_slurm,
    )


def _judge(folder: _Folder, job: _JobView) -> tuple[str, str, Failure | None]:
    """Returns the state of a run, the reason, and its failure if it has one."""
    state, paths = job.state, folder.run.paths
    if folder.record is not None:
        return "COMPLETED", "", None
    if state.state in PENDING:
        failure = held_reason(state)
        return "PENDING", str(failure or state.reason), failure
    if state.is_live:
        return "RUNNING", "" if state.state == "RUNNING" else state.state.lower(), None
    if folder.damage:
        job_unknown = state.reason if state.state == UNKNOWN else ""
        return UNKNOWN, "; ".join(filter(None, (folder.damage, job_unknown))), None
    if _is_result_due(folder, state):
        return "RUNNING", "its job has ended; the result is not visible here yet", None
    if state.is_over:
        return _judge_ended(folder, job)
    if folder.progress is not None and has_fresh_heartbeat(paths):
        return "RUNNING", f"the heartbeat is fresh; {state.reason}", None
    return state.state, state.reason, None


def _judge_ended(folder: _Folder, job: _JobView) -> tuple[str, str, Failure | None]:
    """Returns the state, reason and failure of a run whose job ended without a result."""
    state = "FAILED" if job.state.state == COMPLETED else job.state.state
    if folder.recoveries is None:
        # Without them, errors that a restart has dealt with cannot be told from the last one.
        return state, "", None
    attempt = folder.attempt
    attempt = attempt and attempt.model_copy(update={"job_id": job.job_id or None})
    failure = explain_failure(folder.run.paths, attempt, job.state, folder.recoveries)
    return "CANCELLED" if failure.name == "cancelled" else state, str(failure), failure


def _is_result_due(folder: _Folder, state: JobState) -> bool:
    """Returns whether a job ended a moment ago in a way that leaves a result."""
    if state.ended_at is None or not 0 <= time.time() - state.ended_at < RESULT_GRACE_S:
        return False
    if state.state == COMPLETED:
        return True
    progress = folder.progress
    is_near_end = progress is not None and (
        progress.phase in ("evaluation", "saving", "done")
        or 0 < progress.total_steps <= progress.step
    )
    has_error = any(folder.run.paths.errors.glob("*.json"))
    return state.state == "FAILED" and is_near_end and not has_error


# ---------------------------------------------------------------- for programs


def status_as_json(run: RunStatus) -> dict[str, Any]:
    """Returns the status of a run as JSON values."""
    return {
        "run_id": run.job.run_id,
        "recipe": run.job.recipe,
        "point": run.job.point,
        "sweep_id": run.job.sweep_id,
        "cluster": run.job.cluster,
        "job_id": run.job_id,
        "state": run.state,
        "note": run.note,
        "nodes": run.nodes,
        "elapsed_s": run.elapsed_s,
        "folder": str(run.paths.folder),
        "progress": run.progress.model_dump(mode="json") if run.progress else None,
        "failure": run.failure.as_dict() if run.failure else None,
        "recoveries": [recovery.model_dump(mode="json") for recovery in run.recoveries],
    }
