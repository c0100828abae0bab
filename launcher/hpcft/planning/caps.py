"""Limits layouts to those below what ran out of memory in earlier runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.records import Cluster, Layout, OomCaps, Recovery

HOST_OOM = "host_oom"
"""Failure class of a run that used more host memory than its job had requested."""


class HasFallbacks(Protocol):
    """A run whose fallbacks are known: a finished one, or one without a result yet."""

    @property
    def recipe(self) -> str:
        """Name of the recipe."""

    @property
    def cluster(self) -> str:
        """Name of the profile."""

    @property
    def fallbacks(self) -> Sequence[Recovery]:
        """Out-of-memory fallbacks of the run, in order."""


def caps_from_runs(runs: Iterable[HasFallbacks], recipe: str, cluster: str) -> OomCaps | None:
    """Returns the caps for the next plan of a recipe on a cluster, from its earlier runs.

    Returns:
        The smallest layout that any of the runs fell back to; None where all ran as planned.
    """
    of_recipe = [run for run in runs if (run.recipe, run.cluster) == (recipe, cluster)]
    fallbacks = [[x for x in run.fallbacks if x.cause != HOST_OOM] for run in of_recipe]
    if not any(fallbacks):
        return None
    last = [of_run[-1].layout for of_run in fallbacks if of_run]
    wider = [x.layout.nodes for of_run in fallbacks for x in of_run if x.action == "resubmit"]
    return OomCaps(
        per_device_train_batch_size=min(layout.per_device_train_batch_size for layout in last),
        gradient_checkpointing=any(layout.gradient_checkpointing for layout in last),
        loss_chunks=max(layout.loss_chunks for layout in last),
        nodes=max(wider, default=1),
    )


def apply_caps(layouts: Iterable[Layout], recipe: FullRecipe, cluster: Cluster) -> list[Layout]:
    """Returns the layouts within the caps that earlier runs of the recipe have set.

    A cap that would leave no layout is ignored: what the recipe fixes stays, for a person may know
    better, and so does what the profile allows no more of.
    """
    kept = list(layouts)
    caps = cluster.calibration.oom_caps.get(recipe.name)
    for is_within in _conditions(caps) if caps else ():
        kept = [layout for layout in kept if is_within(layout)] or kept
    return kept


def _conditions(caps: OomCaps) -> Iterator[Callable[[Layout], bool]]:
    yield lambda x: x.nodes >= caps.nodes
    # Without sharding each node would hold as much as a single one does.
    yield lambda x: caps.nodes == 1 or x.nodes == 1 or x.zero_stage > 0
    yield lambda x: x.per_device_train_batch_size <= caps.per_device_train_batch_size
    yield lambda x: x.gradient_checkpointing or not caps.gradient_checkpointing
    yield lambda x: x.loss_chunks >= caps.loss_chunks
