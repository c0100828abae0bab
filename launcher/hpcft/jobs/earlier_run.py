"""Decides what a submission does about an earlier attempt at the same run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hpcft.core import attempts, files
from hpcft.core.errors import UsageError
from hpcft.core.paths import RunPaths
from hpcft.core.run_index import FoundRun, read_run
from hpcft.jobs.prepare import PreparedRun
from hpcft.jobs.run_folder import run_folder
from hpcft.jobs.status import RunStatus, has_fresh_heartbeat, run_statuses
from hpcft.recovery.log import read_recoveries, record_resume, saved_step
from hpcft.scheduler.job_state import COMPLETED, UNKNOWN


def find_earlier_runs(
    runs: Sequence[PreparedRun],
    root: Path,
    *,
    again: bool,
    known: Mapping[Path, RunStatus] | None = None,
) -> list[RunStatus | None]:
    """Finds the earlier runs of the same content, with one look at the scheduler for all.

    Args:
        runs: the runs to submit.
        root: the runs folder, which this process has locked.
        again: whether to run completed or damaged runs once more.
        known: statuses that this command has just read, by run folder. One is used again if its run
            had ended and has no new attempt.

    Returns:
        For each run its earlier run; None if it is to be submitted.

    Raises:
        UsageError: it is not known whether an earlier job is alive, or what came of it.
    """
    found = [read_run(run_folder(root, run)) for run in runs]
    for earlier in filter(None, found):
        files.check_private(earlier.paths.folder)
    statuses = {
        earlier.paths.folder: status
        for earlier in filter(None, found)
        if (status := (known or {}).get(earlier.paths.folder))
        and status.job_ended
        and (status.job, status.damage) == (earlier.job, earlier.damage)
    }
    asked = [e for e in found if e and e.paths.folder not in statuses]
    # This process holds the lock.
    for status in run_statuses(asked, is_locked=lambda _: False):
        statuses[status.paths.folder] = status
    return [
        _judge(earlier, statuses[earlier.paths.folder], again=again) if earlier else None
        for earlier in found
    ]


def _judge(earlier: FoundRun, status: RunStatus, *, again: bool) -> RunStatus | None:
    """Returns an earlier run that is alive or complete; None if it is to be submitted.

    Raises:
        UsageError: it is not known whether its job is alive, or what came of it.
    """
    if status.job_id and status.job.attempts[-1].job_id is None:
        # The command that submitted the job was killed before it could record the job id.
        attempts.record_attempt(status.paths, status.job, status.attempt)
    if status.is_live or (status.state == COMPLETED and not again):
        return status
    name = f"{status.job.recipe}/{status.job.run_id}"
    if earlier.damage and has_fresh_heartbeat(status.paths):
        raise UsageError(
            f"{name}: a job of this run writes heartbeats, but its id is not known "
            f"({status.damage}); restore the file, or cancel the job (squeue --me shows yours)"
        )
    if status.state == UNKNOWN and status.may_be_live and not earlier.damage:
        raise UsageError(
            f"{name}: an earlier job of this run may still be alive, but its state is not known "
            f"({status.note}); try later, or cancel it: hpcft cancel {status.job.run_id}"
        )
    if status.damage and not again:
        raise UsageError(describe_damage(status))
    return None


def describe_damage(status: RunStatus) -> str:
    """Describes a run whose job.json or result.json cannot be read, and what to do about it."""
    caution = "" if status.job_ended else ", if no job of it is queued or running (squeue --me),"
    return (
        f"{status.job.recipe}/{status.job.run_id}: the state of this run is not known "
        f"({status.damage}); restore the file, or{caution} submit the recipe with --again, which "
        "moves the old files to previous/ and runs it once more"
    )


def resume_if_saved(run: PreparedRun, root: Path) -> PreparedRun:
    """Returns the run, set to resume if an earlier attempt has saved something.

    Raises:
        StoreError: a recovery of the earlier attempt cannot be read.
    """
    paths = RunPaths(run_folder(root, run))
    if run.on_resume or paths.result.exists() or not saved_step(paths):
        return run
    read_recoveries(paths)  # Refuses damaged ones before anything is written.
    reason = "it was submitted again"
    return replace(run, on_resume=lambda own: record_resume(own, run.plan, reason))
