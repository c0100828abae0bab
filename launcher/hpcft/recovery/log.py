"""What a run has met and how it went on, in its folder: each is a file, all ranks go by the last.

Caps say how often: a run that comes no further, or meets the same too often, stops and says so.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable

from hpcft.core import attempts, checkpoints
from hpcft.core.files import read_record, write_record, write_record_once
from hpcft.core.paths import RunPaths
from hpcft.core.records import Plan, RankError, Recovery
from hpcft.core.records.recovery import Action
from hpcft.planning import caps, oom_fallback

OUT_OF_MEMORY = "out_of_memory"
FRAGMENTATION = "fragmentation"
"""GPU memory in pieces: all ranks start again with an allocator that can join them."""


def read_recoveries(paths: RunPaths) -> list[Recovery]:
    """Reads the recoveries of a run, the first one first.

    Raises:
        StoreError: one cannot be read, so that it is not known what runs.
    """
    files = paths.recoveries.glob("*.json") if paths.recoveries.is_dir() else ()
    found = [read_record(file, Recovery) for file in files]
    return sorted(found, key=lambda recovery: recovery.number)


def has_recovery(paths: RunPaths, number: int) -> bool:
    """Whether there is one; lists the folder, so that a network file system looks again."""
    return paths.recoveries.is_dir() and f"{number}.json" in os.listdir(paths.recoveries)


def is_superseded_start(paths: RunPaths, job_id: str, restart: int) -> bool:
    """Whether Slurm has started a job again while an earlier start still runs, on a lost node.

    Args:
        paths: the run.
        job_id: the job.
        restart: how often Slurm had started it again before the start that asks.
    """
    return any(
        later.job_id == job_id and later.restart > restart for later in read_recoveries(paths)
    )


def fallbacks(recoveries: Iterable[Recovery]) -> list[Recovery]:
    """Those that went down the ladder."""
    return [recovery for recovery in recoveries if recovery.change]


def describe_fallbacks(recoveries: Iterable[Recovery]) -> str:
    """All rungs in a line: `micro-batch 8 → 4, micro-batch 4 → 2`."""
    return ", ".join(rung.change for rung in fallbacks(recoveries))


def excluded_nodes(recoveries: Iterable[Recovery]) -> list[str]:
    """Nodes that the run keeps away from."""
    return sorted({node for recovery in recoveries for node in recovery.excluded})


def saved_step(paths: RunPaths) -> int:
    """The step that a run would go on from: that of its newest complete checkpoint.

    Of a run that trains nothing it is the number of examples that are answered.
    """
    found, _ = checkpoints.latest_checkpoint(paths)
    answered = sum(
        file.read_bytes().count(b"\n")
        for file in (paths.answers.glob("*.jsonl") if paths.answers.is_dir() else ())
    )
    return max(answered, found.record.step if found else 0)


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
    """Writes a recovery and the plan that follows it; of several ranks at once, one does.

    Args:
        paths: the run.
        before: the plan that ran.
        after: the plan to continue with; the same one unless memory was short.
        number: of the recovery: one more than those that the calling rank runs on.
        action: how the run continues.
        error: which rank failed, and what it said.
        cause: class of the failure.
        step: optimizer step, or example, to resume from.
        restart: how often Slurm had restarted the job before.
        excluded: nodes to keep away from.

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
    """Writes the plan that runs after a recovery; 0 is the start of the run."""
    numbered = plan.model_copy(update={"recovery_number": recovery_number})
    write_record(paths.current_plan, numbered)


def record_resume(paths: RunPaths, plan: Plan, reason: str) -> None:
    """Makes a run folder ready for another attempt that resumes from the last checkpoint.

    Args:
        paths: the run; no job of it is alive.
        plan: of the new attempt.
        reason: why it is resumed.
    """
    attempts.archive(paths, [paths.errors])
    shutil.rmtree(paths.rendezvous, ignore_errors=True)  # its job ids may come again
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
