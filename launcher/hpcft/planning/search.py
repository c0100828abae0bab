"""Searches the layouts in the order of their cost, predicting memory only where it decides.

Time is cheap to predict and memory is not. So all layouts are ordered by what they cost, and their
memory is predicted from the cheapest on until one fits. Memory grows with the micro-batch: of each
kind of layout the largest micro-batch that fits is found by bisection, and a kind whose smallest
does not fit is ruled out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from hpcft.core.records import EvaluatedLayout, Layout, Plan

# Within this share of the least cost the estimate cannot order layouts: then fewer GPUs, which are
# sooner free, and less offloading decide.
NEAR_TIE = 0.03
# A layout that costs more than this many times the best one is not offered as the next best.
NEXT_BEST_WITHIN = 3.0

Kind = tuple[object, ...]


@dataclass(frozen=True)
class Infeasible:
    """A kind of layout that does not fit, even at its smallest micro-batch."""

    smallest: EvaluatedLayout
    """Layout with the smallest micro-batch."""
    plan: Plan | None
    """Plan of that layout; None where a lower bound of its memory is too large already."""
    cost: tuple[float, float]
    """Cost of the cheapest layout of the kind."""


@dataclass
class Search:
    """A search over the layouts of a recipe on a cluster."""

    layouts: Iterable[EvaluatedLayout]
    """Layouts with their predicted time."""
    predict: Callable[[Layout], Plan]
    """Predicts the memory of a layout."""
    fits: Callable[[Plan], bool]
    """Returns whether a plan fits."""
    lower_bound_excess: Callable[[Layout], int]
    """Returns by how many bytes a layout exceeds its tightest limit at least, without a trace."""
    infeasible: dict[Kind, Infeasible] = field(default_factory=dict)
    """Kinds of layout that the search has ruled out so far."""
    _plans: dict[Layout, Plan] = field(default_factory=dict)
    _largest: dict[Kind, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ordered = sorted(self.layouts, key=lambda evaluated: evaluated.cost)
        self._by_size: dict[Kind, list[EvaluatedLayout]] = {}
        for evaluated in sorted(self.ordered, key=_micro_batch):
            self._by_size.setdefault(_kind_with_loss(evaluated.layout), []).append(evaluated)

    def feasible(self) -> Iterator[EvaluatedLayout]:
        """Yields the layouts that fit, the cheapest first."""
        return filter(self._fits, self.ordered)

    def best(self) -> tuple[EvaluatedLayout, EvaluatedLayout | None] | None:
        """Returns the layout to take and the next best of another kind; None if nothing fits."""
        cheapest = next(self.feasible(), None)
        if cheapest is None:
            return None
        rest = [e for e in self.ordered if e.cost >= cheapest.cost]
        near = (e for e in rest if e.gpu_seconds <= (1 + NEAR_TIE) * cheapest.gpu_seconds)
        ties = [cheapest] if cheapest.over_limit_s else [e for e in near if not e.over_limit_s]
        chosen = next(filter(self._fits, sorted(ties, key=_effort)))
        others = (
            e
            for e in rest
            if _kind(e.layout) != _kind(chosen.layout)
            and e.gpu_seconds <= NEXT_BEST_WITHIN * cheapest.gpu_seconds
        )
        return chosen, next(filter(self._fits, others), None)

    def plan(self, layout: Layout) -> Plan:
        """Returns the plan of a layout, whose memory is predicted once."""
        if layout not in self._plans:
            self._plans[layout] = self.predict(layout)
        return self._plans[layout]

    def closest(self, excess: Callable[[Plan], float]) -> Plan | None:
        """Returns the infeasible plan with the smallest excess; None if there are no layouts."""
        best: Plan | None = None
        smallest = [evaluated[0].layout for evaluated in self._by_size.values()]
        bounds = {layout: self.lower_bound_excess(layout) for layout in smallest}
        for layout in sorted(smallest, key=lambda layout: bounds[layout]):
            if best is not None and bounds[layout] >= excess(best):
                break  # All that follow exceed by as much, if not more.
            plan = self.plan(layout)
            best = plan if best is None or excess(plan) < excess(best) else best
        return best

    def _fits(self, evaluated: EvaluatedLayout) -> bool:
        kind = _kind_with_loss(evaluated.layout)
        if kind not in self._largest:
            self._largest[kind] = self._largest_micro_batch(kind, evaluated.cost)
        return _micro_batch(evaluated) <= self._largest[kind]

    def _largest_micro_batch(self, kind: Kind, cost: tuple[float, float]) -> int:
        """Returns the largest micro-batch of a kind that fits, by bisection; 0 for none."""
        sizes = self._by_size[kind]
        if self.lower_bound_excess(sizes[0].layout) > 0:
            self.infeasible[kind] = Infeasible(sizes[0], None, cost)
            return 0
        # The largest accumulates no gradients, so that it may fit where a smaller one does not.
        if self.fits(self.plan(sizes[-1].layout)):
            return _micro_batch(sizes[-1])
        fits, too_large = -1, len(sizes) - 1
        while too_large - fits > 1:
            middle = (fits + too_large) // 2
            if self.fits(self.plan(sizes[middle].layout)):
                fits = middle
            else:
                too_large = middle
        if fits < 0:
            self.infeasible[kind] = Infeasible(sizes[0], self.plan(sizes[0].layout), cost)
            return 0
        return _micro_batch(sizes[fits])


def _micro_batch(evaluated: EvaluatedLayout) -> int:
    return evaluated.layout.per_device_train_batch_size


def _kind(layout: Layout) -> Kind:
    """Returns the key of a layout's kind: shape, ZeRO stage, offloading and checkpointing."""
    return (
        layout.nodes,
        layout.ranks_per_node,
        layout.zero_stage,
        layout.offload_optimizer,
        layout.offload_param,
        layout.gradient_checkpointing,
    )


def _kind_with_loss(layout: Layout) -> Kind:
    """Returns the key of layouts that differ in the micro-batch only."""
    return (*_kind(layout), layout.loss_chunks)


_PLACES = ("none", "cpu", "nvme")


def _effort(evaluated: EvaluatedLayout) -> tuple[float, ...]:
    """Returns the sort key of layouts of about the same cost: the simpler one comes first."""
    layout = evaluated.layout
    return (
        layout.world_size,
        _PLACES.index(layout.offload_optimizer) + _PLACES.index(layout.offload_param),
        layout.zero_stage,
        layout.loss_chunks,
        *evaluated.cost,
    )
