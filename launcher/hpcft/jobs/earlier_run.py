"""Decides what a submission does about an earlier attempt at the same run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hpcft.core import attempts, files
from hpcft.core.errors import UsageError
from hpcft.core.paths import RunPaths
from hpcft.core.run_index import read_run
from hpcft.jobs.prepare import PreparedRun
from hpcft.jobs.run_folder import run_folder
from hpcft.jobs.status import RunStatus, has_fresh_heartbeat, run_status
from hpcft.recovery.log import read_recoveries, record_resume, saved_step
from hpcft.scheduler.job_state import COMPLETED, UNKNOWN


def find_earlier_run(run: PreparedRun, root: Path, *, again: bool) -> RunStatus | None:
    """Returns the earlier run of the same content; None if the run is to be submitted.

    Args:
        run: the run to submit.
        root: the runs folder, which this process has locked.
        again: whether to run a completed or damaged run once more.

    Raises:
        UsageError: it is not known whether an earlier job is alive, or what came of it.
    """
    folder = run_folder(root, run)
    earlier = read_run(folder)
    if earlier is None:
        return None
    files.check_private(folder)
    status = run_status(earlier, is_locked=lambda _: False)  # This process holds the lock.
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
            f"({status.note}); try later, or cancel it: hpcft cancel {run.run_id}"
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
