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
from hpcft.core.files import file_age_s, is_locked
from hpcft.core.paths import RunPaths
from hpcft.core.records import Attempt, Plan, Progress, Recovery, RunRecord
from hpcft.core.run_index import FoundRun
from hpcft.jobs import indexed_runs
from hpcft.jobs.indexed_runs import IndexedStatus
from hpcft.jobs.run_status import RunStatus as RunStatus
from hpcft.jobs.run_status import read_current_plan, read_or_note
from hpcft.recovery.diagnosis import Failure, explain_failure, held_reason
from hpcft.recovery.log import read_recoveries
from hpcft.scheduler import scheduler_named
from hpcft.scheduler.job_state import COMPLETED, PENDING, UNKNOWN, JobState
from hpcft.scheduler.protocol import Scheduler

HEARTBEAT_FRESH_S = 60.0
"""Age in seconds up to which a heartbeat shows that its run is alive. A run writes one every few
seconds; a shared file system may show it half a minute later."""
RESULT_GRACE_S = 20.0
"""Seconds after the end of a job in which its result may still be on its way to this machine."""
_JOB_ID = re.compile(r"[0-9]{1,10}(_[0-9]{1,10})?")


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
    statuses: dict[Path, RunStatus] = {}
    folders: list[_Folder] = []
    new: list[FoundRun] = []
    found = list(runs)
    for run in found:
        if run.indexed:
            statuses[run.paths.folder] = IndexedStatus(run)
            continue
        folder = _read_folder(run)
        finished = _finished(folder)
        if finished:
            # It takes less memory than the records: there may be thousands.
            statuses[run.paths.folder] = finished
            new.append(finished.found)
        else:
            folders.append(folder)
    indexed_runs.add(new)
    for folder, job in zip(folders, _look_at_jobs(folders, is_locked), strict=True):
        statuses[folder.run.paths.folder] = _run_status(folder, job)
    return [statuses[run.paths.folder] for run in found]


def _finished(folder: _Folder) -> IndexedStatus | None:
    """Returns the status of a run that needs no scheduler, as one of the index; None for others."""
    if folder.record is None or folder.attempt is None:
        return None
    job = _JobView(JobState(COMPLETED), folder.attempt.job_id or "")
    return indexed_runs.finished(folder.run, _run_status(folder, job))


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
    record = read_or_note(paths.result, RunRecord, damage)
    if record and record.run_id != paths.folder.name:
        damage.append(f"{paths.result}: belongs to the run {record.run_id}")
        record = None
    notes: list[str] = []
    recoveries: tuple[Recovery, ...] | None = None
    try:
        recoveries = tuple(read_recoveries(paths))
    except StoreError as error:
        notes.append(str(error))
    progress = read_or_note(paths.progress, Progress, notes)
    plan = read_current_plan(paths, recoveries or (), notes)
    return _Folder(
        run=run,
        damage="; ".join(damage),
        notes=tuple(notes),
        record=record,
        progress=progress,
        plan=plan,
        recoveries=recoveries,
    )


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
