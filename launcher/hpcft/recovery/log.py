"""What a run has met and how it went on, in its folder: each is a file, all ranks go by the last.

Caps say how often: a run that comes no further, or meets the same too often, stops and says so.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable

from hpcft.config.recipe_types import FullRecipe
from hpcft.core import attempts, checkpoints
from hpcft.core.errors import StoreError
from hpcft.core.files import read_record, write_record, write_record_once
from hpcft.core.paths import RunPaths
from hpcft.core.records import Cluster, Plan, Recovery
from hpcft.core.records.recovery import Action
from hpcft.planning import caps, oom_fallback
from hpcft.recovery.diagnosis import RankError

OUT_OF_MEMORY = "out_of_memory"
FRAGMENTATION = "fragmentation"
"""GPU memory in pieces: all ranks start again with an allocator that can join them."""


def read_recoveries(paths: RunPaths) -> list[Recovery]:
    """The recoveries of a run, the first one first; damaged files are left out."""
    found = []
    for file in paths.recoveries.glob("*.json") if paths.recoveries.is_dir() else ():
        try:
            found.append(read_record(file, Recovery))
        except StoreError:
            continue
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


def current_plan(paths: RunPaths, recipe: FullRecipe, cluster: Cluster) -> Plan:
    """The plan that runs now: the submitted one, with the layout of the last recovery."""
    plan = read_record(paths.plan, Plan)
    found = read_recoveries(paths)
    if not found:
        return plan
    last = found[-1]
    return oom_fallback.with_layout(
        plan, last.layout, last.per_device_eval_batch_size, recipe, cluster
    )


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
    who: RankError,
    cause: str = OUT_OF_MEMORY,
    step: int = 0,
    restart: int = 0,
    excluded: Iterable[str] = (),
) -> bool:
    """Writes a recovery down: of several ranks that take the same one at once, one does.

    Args:
        paths: the run.
        before: the plan that ran.
        after: the plan to go on with; the same one unless the ladder changes it.
        number: of the recovery: one more than the rank runs on.
        how: whether the same process goes on, all ranks start again, or another job takes over.
        who: which rank met it, and what it said.
        cause: class of the failure.
        step: that it goes on from.
        restart: how often Slurm had started the job again before.
        excluded: nodes to keep away from.

    Returns:
        Whether it was this call that wrote it.
    """
    recovery = Recovery(
        number=number,
        at=who.at,
        job_id=who.job_id,
        restart=restart,
        rank=who.rank,
        node=who.node,
        cause=cause,
        evidence=who.message,
        action=action,
        step=step,
        change=oom_fallback.describe_change(before, after)
        if cause in (OUT_OF_MEMORY, caps.HOST_OOM)
        else "",
        layout=after.layout,
        per_device_eval_batch_size=after.per_device_eval_batch_size,
        excluded=list(excluded),
    )
    paths.recoveries.mkdir(mode=0o700, exist_ok=True)
    if not write_record_once(paths.recoveries / f"{number}.json", recovery):
        return False
    if recovery.change:
        write_record(paths.current_plan, after)
    return True


def record_resume(paths: RunPaths, plan: Plan, said: str) -> None:
    """Makes a run folder ready for another attempt that goes on, not anew.

    Args:
        paths: the run; no job of it is alive.
        plan: of the new attempt.
        said: why it goes on.
    """
    attempts.archive(paths, [paths.errors])
    shutil.rmtree(paths.rendezvous, ignore_errors=True)  # its job ids may come again
    here = os.uname().nodename
    who = RankError(rank=0, node=here, at=time.time(), kind="", message=said)
    number = len(read_recoveries(paths)) + 1
    step = saved_step(paths)
    append_recovery(
        paths, plan, plan, number=number, action="resume", who=who, cause="resumed", step=step
    )


def remove_last_recovery(
    paths: RunPaths, last: Recovery, recipe: FullRecipe, cluster: Cluster
) -> Plan:
    """Removes the last recovery, which could not be gone on with; the plan before it."""
    (paths.recoveries / f"{last.number}.json").unlink()
    before = current_plan(paths, recipe, cluster)
    write_record(paths.current_plan, before)
    return before
