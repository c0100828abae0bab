"""Recovery log: a file per recovery in the run folder; all ranks follow the newest one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable

from hpcft.core import attempts, checkpoints
from hpcft.core.errors import StoreError
from hpcft.core.files import read_record_if_exists, write_record, write_record_once
from hpcft.core.paths import RunPaths
from hpcft.core.records import Plan, RankError, Recovery
from hpcft.core.records.recovery import Action
from hpcft.planning import caps, oom_fallback

OUT_OF_MEMORY = "out_of_memory"
FRAGMENTATION = "fragmentation"
"""Failure class of fragmented GPU memory: all ranks restart with expandable segments."""


def read_recoveries(paths: RunPaths) -> list[Recovery]:
    """Reads the recoveries of a run, the first one first.

    Raises:
        StoreError: one cannot be read, so that nobody knows which plan runs.
    """
    files = paths.recoveries.glob("*.json") if paths.recoveries.is_dir() else ()
    try:
        # A recovery that could not be carried out may be removed while this reads the folder.
        recoveries = [read_record_if_exists(file, Recovery) for file in files]
    except StoreError as error:
        raise StoreError(
            f"{error}; without this recovery the run's current plan is not known: restore the "
            "file, or start the run from the beginning (hpcft submit --again)"
        ) from None
    return sorted(filter(None, recoveries), key=lambda recovery: recovery.number)


def has_recovery(paths: RunPaths, number: int) -> bool:
    """Returns whether the recovery of that number exists.

    It lists the folder, because a network file system then asks its server again.
    """
    return paths.recoveries.is_dir() and f"{number}.json" in os.listdir(paths.recoveries)


def is_superseded_start(paths: RunPaths, job_id: str, restart: int) -> bool:
    """Returns whether Slurm has restarted a job while an earlier start runs on a lost node.

    Args:
        paths: the run's files.
        job_id: the job.
        restart: how often Slurm had restarted the job before the start in question.
    """
    return any(
        later.job_id == job_id and later.restart > restart for later in read_recoveries(paths)
    )


def fallbacks(recoveries: Iterable[Recovery]) -> list[Recovery]:
    """Returns the recoveries that changed the plan because memory ran out."""
    return [recovery for recovery in recoveries if recovery.change]


def describe_fallbacks(recoveries: Iterable[Recovery]) -> str:
    """Describes all fallbacks in a line, for example `micro-batch 8 → 4, micro-batch 4 → 2`."""
    return ", ".join(fallback.change for fallback in fallbacks(recoveries))


def excluded_nodes(recoveries: Iterable[Recovery]) -> list[str]:
    """Returns the nodes on which the run must not start again."""
    return sorted({node for recovery in recoveries for node in recovery.excluded})


def saved_step(paths: RunPaths) -> int:
    """Returns the optimizer step of the newest complete checkpoint; 0 without one.

    For a run that does not train it is the number of answered examples.
    """
    checkpoint, _ = checkpoints.latest_checkpoint(paths)
    answered = sum(
        file.read_bytes().count(b"\n")
        for file in (paths.answers.glob("*.jsonl") if paths.answers.is_dir() else ())
    )
    return max(answered, checkpoint.record.step if checkpoint else 0)


def append_recovery(
    paths: RunPaths,
    before: Plan,
    after: Plan,
    *,
    number: int,
    action: Action,
    error: RankError,
    cause: str = OUT_OF_MEMORY,
    step: int = 0,
    restart: int = 0,
    excluded: Iterable[str] = (),
) -> bool:
    """Writes a recovery and the plan that follows it, unless another rank has written it.

    Args:
        paths: the run's files.
        before: the plan that ran.
        after: the plan to continue with; the same one unless memory was short.
        number: of the recovery: one more than those that the calling rank runs on.
        action: how the run continues.
        error: which rank failed, and its message.
        cause: class of the failure.
        step: optimizer step, or example, to resume from.
        restart: how often Slurm had restarted the job before.
        excluded: nodes on which the run must not start again.

    Returns:
        Whether this call wrote it.
    """
    is_fallback = cause in (OUT_OF_MEMORY, caps.HOST_OOM)
    recovery = Recovery(
        number=number,
        at=error.at,
        job_id=error.job_id,
        restart=restart,
        rank=error.rank,
        node=error.node,
        cause=cause,
        evidence=error.message,
        action=action,
        step=step,
        change=oom_fallback.describe_change(before, after) if is_fallback else "",
        layout=after.layout,
        per_device_eval_batch_size=after.per_device_eval_batch_size,
        excluded=list(excluded),
    )
    paths.recoveries.mkdir(mode=0o700, exist_ok=True)
    if not write_record_once(paths.recoveries / f"{number}.json", recovery):
        return False
    write_current_plan(paths, after, number)
    return True


def write_current_plan(paths: RunPaths, plan: Plan, recovery_number: int) -> None:
    """Writes the plan that runs from now on.

    Args:
        paths: the run's files.
        plan: the plan.
        recovery_number: recovery that the plan follows; 0 for the start of the run.
    """
    numbered = plan.model_copy(update={"recovery_number": recovery_number})
    write_record(paths.current_plan, numbered)


def record_resume(paths: RunPaths, plan: Plan, reason: str) -> None:
    """Prepares a run folder for another attempt that resumes from the last checkpoint.

    Args:
        paths: the run's files; no job of the run is alive.
        plan: plan of the new attempt.
        reason: why the run is resumed.
    """
    attempts.archive(paths, [paths.errors])
    # Slurm and this machine may use a job id twice, and its rendezvous must not be found then.
    shutil.rmtree(paths.rendezvous, ignore_errors=True)
    append_recovery(
        paths,
        plan,
        plan,
        number=len(read_recoveries(paths)) + 1,
        action="resume",
        error=RankError.now(0, "", reason),
        cause="resumed",
        step=saved_step(paths),
    )
