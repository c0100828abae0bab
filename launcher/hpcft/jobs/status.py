"""Run folders and one look at the scheduler make rows: what is known of each run now."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcft.core.errors import ClusterError, StoreError
from hpcft.core.files import R, file_age_s, is_locked, read_record_if_exists
from hpcft.core.paths import RunPaths
from hpcft.core.records import Attempt, Job, Plan, Progress, Recovery, RunRecord
from hpcft.recovery.diagnosis import Failure, explain_failure, held_reason
from hpcft.recovery.log import fallbacks, read_recoveries
from hpcft.scheduler import local, slurm
from hpcft.scheduler.job_state import COMPLETED, PENDING, UNKNOWN, JobState

# A live run rewrites its heartbeat every few seconds; shared file systems may lag by half a minute.
HEARTBEAT_FRESH_S = 60.0
# What a job wrote last may be seen so much later than its end.
RESULT_GRACE_S = 20.0


@dataclass(frozen=True)
class RunStatus:
    """What is known of a run."""

    paths: RunPaths
    job: Job
    state: str
    """PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, TIMEOUT …; UNKNOWN when nobody can say."""
    note: str = ""
    """Why it pends, failed or is unknown."""
    job_id: str = ""
    nodes: str = ""
    elapsed_s: float | None = None
    progress: Progress | None = None
    record: RunRecord | None = None
    plan: Plan | None = None
    recoveries: tuple[Recovery, ...] = ()
    """What it has met on its way."""
    failure: Failure | None = None
    """Why it failed, or is held; None where it did not, or nobody knows."""
    unknown_to_slurm: bool = False
    """Whether Slurm has no such job any more: however it ended, it is not alive."""

    @property
    def fallbacks(self) -> list[Recovery]:
        """Steps down the ladder that it has taken."""
        return fallbacks(self.recoveries)

    @property
    def is_live(self) -> bool:
        """Whether it is queued or runs."""
        return self.state in ("PENDING", "RUNNING")


def run_status(
    paths: RunPaths, job: Job, is_locked: Callable[[Path], bool] = is_locked
) -> RunStatus:
    """What is known of one run; arguments as of `snapshot`."""
    return run_statuses([(paths, job)], is_locked)[0]


def run_statuses(
    runs: Iterable[tuple[RunPaths, Job]], is_locked: Callable[[Path], bool] = is_locked
) -> list[RunStatus]:
    """What is known of many runs, with one look at each scheduler.

    Args:
        runs: run folders and their jobs.
        is_locked: whether some command is submitting from a runs folder.
    """
    listed = [(job, job.attempts[-1] if job.attempts else None, _read(p)) for p, job in runs]
    asked: dict[str, str] = {}
    trouble = ""
    by_token: dict[tuple[str, int | None], str] | None = None
    for job, attempt, files in listed:
        # Of a run with a result there is nothing left to ask.
        if job.scheduler == "slurm" and attempt and files.record is None:
            job_id = attempt.job_id
            try:
                if job_id is None and not trouble:
                    by_token = slurm.ids_by_token() if by_token is None else by_token
                    job_id = by_token.get((attempt.token, attempt.array_index))
                    job_id = job_id or _queues_anew(files) or _wrote(files)
            except ClusterError as error:
                trouble = str(error)
            if job_id:
                asked[attempt.token + str(attempt.array_index)] = job_id
    answers = slurm.job_states(sorted(set(asked.values())))
    views = []
    for job, attempt, files in listed:
        if attempt is None:
            state, job_id = JobState("FAILED", "was never submitted"), ""
        elif job.scheduler == "local":
            state, job_id = local.state(attempt), attempt.job_id or ""
        else:
            job_id = asked.get(attempt.token + str(attempt.array_index), attempt.job_id or "")
            if job_id in answers:
                state = answers[job_id]
            elif trouble:
                state = JobState(UNKNOWN, trouble)
            elif is_locked(files.paths.folder.parents[1]):
                state = JobState("PENDING", "is being submitted")
            else:
                state = JobState("FAILED", "was not queued: the submitting command was interrupted")
        if files.record is None and not state.is_live:
            files = _read_anew(files.paths)
        views.append(_view(job, attempt, files, job_id, state))
    return views


@dataclass(frozen=True)
class _Files:
    """What a run folder holds, and what of it is damaged."""

    paths: RunPaths
    record: RunRecord | None
    progress: Progress | None
    plan: Plan | None
    recoveries: tuple[Recovery, ...]
    damage: str


def _read(paths: RunPaths) -> _Files:
    damage: list[str] = []

    def part(file: Path, kind: type[R]) -> R | None:
        try:
            return read_record_if_exists(file, kind)
        except StoreError as error:
            damage.append(str(error))
            return None

    record = part(paths.result, RunRecord)
    if record and record.run_id != paths.folder.name:
        damage.append(f"{paths.result}: is that of the run {record.run_id}")
        record = None
    progress, plan = part(paths.progress, Progress), part(paths.plan, Plan)
    return _Files(paths, record, progress, plan, tuple(read_recoveries(paths)), "; ".join(damage))


def _read_anew(paths: RunPaths) -> _Files:
    """Reads the folder of a run that may have written its last since it was read."""
    with contextlib.suppress(OSError):
        os.listdir(paths.folder)  # has a network file system look for new files
    return _read(paths)


def _wrote(files: _Files) -> str | None:
    """The job that wrote the heartbeat, where the one that queued it could not note its id."""
    return (files.progress.job_id or None) if files.progress else None


def _result_is_due(files: _Files, state: JobState) -> bool:
    """Whether a job ended a moment ago in a way that leaves a result, which may come late."""
    if state.ended_at is None or not 0 <= time.time() - state.ended_at < RESULT_GRACE_S:
        return False
    if state.state == COMPLETED:
        return True
    p = files.progress
    near = p is not None and (
        p.phase in ("evaluation", "saving", "done") or 0 < p.total_steps <= p.step
    )
    return state.state == "FAILED" and near and not any(files.paths.errors.glob("*.json"))


def _is_fresh(file: Path) -> bool:
    """Whether a heartbeat was written a moment ago."""
    try:
        return abs(file_age_s(file)) < HEARTBEAT_FRESH_S
    except OSError:
        return False


def _queues_anew(files: _Files) -> str | None:
    """The job that is about to queue the run anew: it lives until that is done."""
    last = files.recoveries[-1] if files.recoveries else None
    return last.job_id if last and last.action == "resubmit" else None


def _view(
    job: Job, attempt: Attempt | None, files: _Files, job_id: str, state: JobState
) -> RunStatus:
    paths, record, progress = files.paths, files.record, files.progress
    word, note = state.state, state.reason
    failure: Failure | None = None
    if record is not None:
        word, note = "COMPLETED", ""
    elif state.state in PENDING:
        word, failure = "PENDING", held_reason(state)
        note = str(failure) if failure else note
    elif state.is_live:
        word = "RUNNING"
        note = "" if state.state == "RUNNING" else state.state.lower()
    elif _result_is_due(files, state):
        word, note = "RUNNING", "has ended; its result may still be on its way"
    elif state.is_over:
        word = "FAILED" if state.state == COMPLETED else state.state
        if not files.damage:
            found = attempt and attempt.model_copy(update={"job_id": job_id or None})
            failure = explain_failure(paths, found, state, files.recoveries)
            if failure.name == "cancelled":
                word = "CANCELLED"
        note = str(failure) if failure else ""
    elif progress is not None and _is_fresh(paths.progress):
        word, note = "RUNNING", f"heartbeat is fresh; {state.reason}"
    elapsed = record.measured.wall_s if record and record.measured else state.elapsed_s
    nodes = state.nodes or (progress.node if progress else "")
    note = "; ".join(part for part in (files.damage, note) if part)
    return RunStatus(
        paths,
        job,
        word,
        note,
        job_id,
        nodes,
        elapsed,
        progress,
        record,
        files.plan,
        files.recoveries,
        failure,
        state.unknown_to_slurm,
    )


# ---------------------------------------------------------------- the status table


def status_as_json(view: RunStatus) -> dict[str, Any]:
    """A view for programs."""
    return {
        "run_id": view.job.run_id,
        "recipe": view.job.recipe,
        "point": view.job.point,
        "sweep_id": view.job.sweep_id,
        "cluster": view.job.cluster,
        "job_id": view.job_id,
        "state": view.state,
        "note": view.note,
        "nodes": view.nodes,
        "elapsed_s": view.elapsed_s,
        "folder": str(view.paths.folder),
        "progress": view.progress.model_dump(mode="json") if view.progress else None,
        "failure": view.failure.as_dict() if view.failure else None,
        "recoveries": [recovery.model_dump(mode="json") for recovery in view.recoveries],
    }
