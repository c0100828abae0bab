"""The search: layouts in the order of their cost, with memory predicted only where it decides.

Time is cheap to predict and memory is not. So all layouts are ordered by what they cost, and memory
is asked for from the cheapest on until one fits. Memory grows with the micro-batch: of each kind of
layout the largest that fits is found by bisection, and a kind whose smallest does not fit is out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from hpcft.core.records import Layout, Plan, RunTime

# Within this share of the least cost the estimate cannot tell layouts apart: fewer GPUs, which are
# sooner free, then less offloading decide.
NEAR_TIE = 0.03
# A next best that costs more than this many times the best is none.
NEXT_BEST_WITHIN = 3.0

Variant = tuple[object, ...]


@dataclass(frozen=True)
class Candidate:
    """A layout with what it costs."""

    layout: Layout
    time: RunTime
    over_limit_s: float
    """By how much the run exceeds its time limit; 0 within it or where its length is unknown."""

    @property
    def gpu_seconds(self) -> float:
        """GPU time of the run, or of an example where the length of the run is not known."""
        run_s, layout = self.time.run_s, self.layout
        if run_s is not None:
            return layout.world_size * run_s
        examples = layout.per_device_train_batch_size * layout.gradient_accumulation_steps
        return self.time.step.total_s / examples

    @property
    def cost(self) -> tuple[float, float]:
        """What is compared: being on time first, then GPU time."""
        return self.over_limit_s, self.gpu_seconds


@dataclass(frozen=True)
class Infeasible:
    """A layout that does not fit, even at the smallest micro-batch of its kind."""

    candidate: Candidate
    """The one with the smallest micro-batch."""
    plan: Plan | None
    """Its predicted memory; None where what is known without a trace is too large."""
    cost: tuple[float, float]
    """Cost of the cheapest of its kind."""


@dataclass
class Search:
    """One search over the layouts of a recipe on a cluster."""

    candidates: Iterable[Candidate]
    price: Callable[[Candidate], Plan]
    """Predicts the memory of a layout."""
    fits: Callable[[Plan], bool]
    """Whether a plan fits."""
    surely_over: Callable[[Layout], int]
    """Bytes by which a layout exceeds what there is at least, seen without a trace."""
    fallen: dict[Variant, Infeasible] = field(default_factory=dict)
    """What did not fit, as far as the search has come."""
    _priced: dict[Layout, Plan] = field(default_factory=dict)
    _largest: dict[Variant, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ordered = sorted(self.candidates, key=lambda candidate: candidate.cost)
        self._sizes: dict[Variant, list[Candidate]] = {}
        for candidate in sorted(self.ordered, key=_micro_batch):
            self._sizes.setdefault(_variant(candidate.layout), []).append(candidate)

    def fitting(self) -> Iterator[Candidate]:
        """The layouts that fit, the cheapest first."""
        return filter(self._fits, self.ordered)

    def best(self) -> tuple[Candidate, Candidate | None] | None:
        """The layout to take and the next best of another kind; None where nothing fits."""
        first = next(self.fitting(), None)
        if first is None:
            return None
        rest = [c for c in self.ordered if c.cost >= first.cost]
        near = (c for c in rest if c.gpu_seconds <= (1 + NEAR_TIE) * first.gpu_seconds)
        alike = [first] if first.over_limit_s else [c for c in near if not c.over_limit_s]
        chosen = next(filter(self._fits, sorted(alike, key=_effort)))
        others = (
            c
            for c in rest
            if _kind(c.layout) != _kind(chosen.layout)
            and c.gpu_seconds <= NEXT_BEST_WITHIN * first.gpu_seconds
        )
        return chosen, next(filter(self._fits, others), None)

    def priced(self, candidate: Candidate) -> Plan:
        """The candidate with its predicted memory."""
        if candidate.layout not in self._priced:
            self._priced[candidate.layout] = self.price(candidate)
        return self._priced[candidate.layout]

    def closest(self, excess: Callable[[Plan], float]) -> Plan | None:
        """Of what does not fit the plan that comes closest; None where there is no layout."""
        best: Plan | None = None
        smallest = [sizes[0] for sizes in self._sizes.values()]
        least = {c.layout: self.surely_over(c.layout) for c in smallest}
        for candidate in sorted(smallest, key=lambda c: least[c.layout]):
            if best is not None and least[candidate.layout] >= excess(best):
                break  # and all that follow exceed by as much, if not more
            plan = self.priced(candidate)
            best = plan if best is None or excess(plan) < excess(best) else best
        return best

    def _fits(self, candidate: Candidate) -> bool:
        variant = _variant(candidate.layout)
        if variant not in self._largest:
            self._largest[variant] = self._largest_micro_batch(variant, candidate.cost)
        return _micro_batch(candidate) <= self._largest[variant]

    def _largest_micro_batch(self, variant: Variant, cost: tuple[float, float]) -> int:
        """The largest micro-batch of a kind of layout that fits, by bisection; 0 for none."""
        sizes = self._sizes[variant]
        if self.surely_over(sizes[0].layout) > 0:
            self.fallen[variant] = Infeasible(sizes[0], None, cost)
            return 0
        # The largest accumulates no gradients, so that it may fit where a smaller one does not.
        if self.fits(self.priced(sizes[-1])):
            return _micro_batch(sizes[-1])
        fits, too_large = -1, len(sizes) - 1
        while too_large - fits > 1:
            middle = (fits + too_large) // 2
            if self.fits(self.priced(sizes[middle])):
                fits = middle
            else:
                too_large = middle
        if fits < 0:
            self.fallen[variant] = Infeasible(sizes[0], self.priced(sizes[0]), cost)
            return 0
        return _micro_batch(sizes[fits])


def _micro_batch(candidate: Candidate) -> int:
    return candidate.layout.per_device_train_batch_size


def _variant(layout: Layout) -> Variant:
    """What layouts have in common that differ in the micro-batch only."""
    return (*_kind(layout), layout.loss_chunks)


def _kind(layout: Layout) -> Variant:
    """What makes a layout another one to people: shape, sharding, offloading, recomputation."""
    return (
        layout.nodes,
        layout.ranks_per_node,
        layout.zero_stage,
        layout.offload_optimizer,
        layout.offload_param,
        layout.gradient_checkpointing,
    )


_PLACES = ("none", "cpu", "nvme")


def _effort(candidate: Candidate) -> tuple[float, ...]:
    """What decides between layouts of the same cost: the simpler one, then the cheaper one."""
    layout = candidate.layout
    return (
        layout.world_size,
        _PLACES.index(layout.offload_optimizer) + _PLACES.index(layout.offload_param),
        layout.zero_stage,
        layout.loss_chunks,
        *candidate.cost,
    )
