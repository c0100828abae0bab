"""The rungs that a run has taken, in its folder: each is a file, and all ranks go by the last."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Literal

from hpcft import ladder
from hpcft.errors import StoreError
from hpcft.failures import RankError
from hpcft.paths import RunPaths
from hpcft.recipe import FullRecipe
from hpcft.records import Cluster, Plan, Rung
from hpcft.store import read, write, write_once

How = Literal["in-process", "restarted", "queued anew"]


def taken(paths: RunPaths) -> list[Rung]:
    """The rungs of a run, the first one first; damaged files are left out."""
    found = []
    for file in paths.rungs.glob("*.json") if paths.rungs.is_dir() else ():
        try:
            found.append(read(file, Rung))
        except StoreError:
            continue
    return sorted(found, key=lambda rung: rung.number)


def is_taken(paths: RunPaths, number: int) -> bool:
    """Whether a rung was taken; lists the folder, so that a network file system looks again."""
    return paths.rungs.is_dir() and f"{number}.json" in os.listdir(paths.rungs)


def in_words(rungs: Iterable[Rung]) -> str:
    """All rungs in a line: `micro-batch 8 → 4, micro-batch 4 → 2`."""
    return ", ".join(rung.change for rung in rungs)


def plan_now(paths: RunPaths, recipe: FullRecipe, cluster: Cluster) -> Plan:
    """The plan that runs now: the submitted one, with the layout of the last rung."""
    plan = read(paths.plan, Plan)
    rungs = taken(paths)
    if not rungs:
        return plan
    last = rungs[-1]
    return ladder.with_layout(plan, last.layout, last.per_device_eval_batch_size, recipe, cluster)


def take(
    paths: RunPaths,
    before: Plan,
    after: Plan,
    *,
    number: int,
    how: How,
    who: RankError,
) -> None:
    """Writes a rung down: of several ranks that take the same one at once, one does.

    Args:
        paths: the run.
        before: the plan that ran.
        after: the plan to go on with.
        number: of the rung: one more than the rank runs on.
        how: whether the same process goes on, all ranks start again, or another job takes over.
        who: which rank was out of memory, and what it said.
    """
    rung = Rung(
        number=number,
        at=who.at,
        job_id=who.job_id,
        rank=who.rank,
        node=who.node,
        change=ladder.change(before, after),
        evidence=who.message,
        how=how,
        layout=after.layout,
        per_device_eval_batch_size=after.per_device_eval_batch_size,
    )
    paths.rungs.mkdir(mode=0o700, exist_ok=True)
    if write_once(paths.rungs / f"{number}.json", rung):
        write(paths.effective_plan, after)


def take_back(paths: RunPaths, rung: Rung, recipe: FullRecipe, cluster: Cluster) -> Plan:
    """Removes the last rung, which could not be gone down to; the plan before it."""
    (paths.rungs / f"{rung.number}.json").unlink()
    before = plan_now(paths, recipe, cluster)
    write(paths.effective_plan, before)
    return before
