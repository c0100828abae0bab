"""Limits layouts to those below what ran out of memory before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.records import Cluster, Layout, OomCaps, Recovery

HOST_OOM = "host_oom"
"""Class of a run that took more of its nodes' memory than it had asked for."""


class HasFallbacks(Protocol):
    """A run of which it is known what rungs it took: a record, or one that has none yet."""

    @property
    def recipe(self) -> str:
        """Name of the recipe."""

    @property
    def cluster(self) -> str:
        """Name of the profile."""

    @property
    def fallbacks(self) -> Sequence[Recovery]:
        """Its rungs, in order."""


def caps_from_runs(runs: Iterable[HasFallbacks], recipe: str, cluster: str) -> OomCaps | None:
    """What the runs of a recipe's name on a cluster say of its next plan.

    Returns:
        The least that any of them came down to, as a cap; None where all ran as planned.
    """
    alike = [run for run in runs if (run.recipe, run.cluster) == (recipe, cluster)]
    down = [[x for x in run.fallbacks if x.cause != HOST_OOM] for run in alike]
    if not any(down):
        return None
    ends = [rungs[-1].layout for rungs in down if rungs]
    widened = [x.layout.nodes for rungs in down for x in rungs if x.action == "resubmit"]
    return OomCaps(
        per_device_train_batch_size=min(end.per_device_train_batch_size for end in ends),
        gradient_checkpointing=any(end.gradient_checkpointing for end in ends),
        loss_chunks=max(end.loss_chunks for end in ends),
        nodes=max(widened, default=1),
    )


def apply_caps(found: Iterable[Layout], recipe: FullRecipe, cluster: Cluster) -> list[Layout]:
    """The layouts without those that earlier runs of the recipe had to come down from.

    What the recipe itself fixes stays: a person may know better. So does what the profile allows
    no more: of several caps, one that would leave nothing is passed over.
    """
    kept = list(found)
    cap = cluster.calibration.oom_caps.get(recipe.name)
    for is_below in _caps(cap) if cap else ():
        kept = [layout for layout in kept if is_below(layout)] or kept
    return kept


def _caps(cap: OomCaps) -> Iterator[Callable[[Layout], bool]]:
    yield lambda x: x.nodes >= cap.nodes
    # Unsharded, each node would hold as much as one alone.
    yield lambda x: cap.nodes == 1 or x.nodes == 1 or x.zero_stage > 0
    yield lambda x: x.per_device_train_batch_size <= cap.per_device_train_batch_size
    yield lambda x: x.gradient_checkpointing or not cap.gradient_checkpointing
    yield lambda x: x.loss_chunks >= cap.loss_chunks
