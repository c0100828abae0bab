"""Orders the training examples into steps, ranks and micro-batches.

The examples of a step depend on the seed, the epoch and the global batch, never on the layout; and
losses are sums over a step's examples. So a run on other ranks, or with other micro-batches, takes
the same steps up to rounding. The examples of a step are divided so that ranks wait little for each
other, with little padding:

- padded micro-batches hold equally many examples, of similar length;
- packed micro-batches hold about equally many tokens. Each has room for `micro-batch × max_length`
  tokens, as planned; so a step of shorter examples needs fewer of them.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch.utils.data import Sampler

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.records import Plan
from hpcft.tasks.base import IGNORE_INDEX, ModelInputs
from hpcft.training.data.prepare import PreparedSplit

Group = list[int]
"""Indices of examples."""
GROUPED_STEPS = 50
"""Number of global batches that `group_by_length` sorts together, as transformers does."""


@dataclass(frozen=True)
class BatchPlan:
    """The steps and micro-batches of a run's training examples."""

    lengths: Sequence[int]
    """Tokens of each example."""
    global_batch: int
    """Examples of an optimizer step."""
    strategy: str
    """`train.train_sampling_strategy`."""
    seed: int
    """`train.seed`."""
    epochs: int
    """Number of epochs; the last one may end early."""
    ranks: int
    """Number of ranks."""
    max_accumulation: int
    """Planned number of micro-batches of a step on each rank, which is the largest needed."""
    max_tokens: int | None = None
    """Largest number of tokens in a packed micro-batch; None: micro-batches are padded."""

    def steps(self, epoch: int) -> list[Group]:
        """Returns the examples of each step of an epoch."""
        rng = random.Random(f"{self.seed}/{epoch}")
        size, count = self.global_batch, len(self.lengths)
        order = list(range(count))
        if self.strategy != "sequential":
            rng.shuffle(order)
        if self.strategy == "group_by_length":
            # With fewer than four windows, every epoch would sort the same examples together.
            window = size * max(1, min(GROUPED_STEPS, count // (4 * size)))
            windows = [order[at : at + window] for at in range(0, count, window)]
            order = [index for group in windows for index in self._longest_first(group)]
        steps = [order[at : at + size] for at in range(0, count, size)]
        if self.strategy == "group_by_length":
            rng.shuffle(steps)
        return steps

    @cached_property
    def accumulation(self) -> int:
        """Micro-batches of a step on each rank: the smallest number that every step fits into.

        The planned number always suffices: an example goes to the emptiest micro-batch, and if
        that had less room than `max_length`, all of them would hold at least `micro-batch`
        examples, and so the whole step.
        """
        if self.max_tokens is None:
            return self.max_accumulation
        accumulation = 1
        for epoch in range(self.epochs):
            for step in self.steps(epoch):
                while accumulation < self.max_accumulation and not self._fits(step, accumulation):
                    accumulation += 1
        return accumulation

    def micro_batches(self, epoch: int) -> Iterator[tuple[int, ...]]:
        """Yields the micro-batches of an epoch, the ranks taking turns; the last may be empty."""
        for step in self.steps(epoch):
            yield from map(tuple, self._divide(step, self.accumulation))

    def _fits(self, step: Group, accumulation: int) -> bool:
        loads = [sum(map(self._length, group)) for group in self._divide(step, accumulation)]
        return self.max_tokens is None or max(loads) <= self.max_tokens

    def _divide(self, step: Group, accumulation: int) -> list[Group]:
        """Divides the examples of a step among the micro-batches of all ranks."""
        count = self.ranks * accumulation
        ordered = self._longest_first(step)
        if self.max_tokens is None:
            ends = [len(step) * number // count for number in range(count + 1)]
            return [ordered[ends[i] : ends[i + 1]] for i in range(count)]
        # The longest goes first, each to the emptiest (Graham 1969, doi:10.1137/0117039).
        loads = [(0, number) for number in range(count)]
        groups: list[Group] = [[] for _ in loads]
        for index in ordered:
            load, number = loads[0]
            groups[number].append(index)
            heapq.heapreplace(loads, (load + self._length(index), number))
        return groups

    def _longest_first(self, group: Group) -> Group:
        return sorted(group, key=self._length, reverse=True)

    def _length(self, index: int) -> int:
        return self.lengths[index]


def plan_batches(recipe: FullRecipe, plan: Plan, lengths: Sequence[int]) -> BatchPlan:
    """Plans the steps and micro-batches of a run.

    Args:
        recipe: the run's recipe.
        plan: the plan that runs now.
        lengths: tokens of each training example.
    """
    train, layout = recipe.train, plan.layout
    epochs = train.num_train_epochs
    if train.max_steps > 0:
        epochs = train.max_steps * train.global_batch_size / len(lengths)
    room = layout.per_device_train_batch_size * recipe.task.max_length
    return BatchPlan(
        lengths=lengths,
        global_batch=train.global_batch_size,
        strategy=train.train_sampling_strategy,
        seed=train.seed,
        epochs=math.ceil(epochs),
        ranks=layout.world_size,
        max_accumulation=layout.gradient_accumulation_steps,
        max_tokens=room if recipe.packs(plan.facts.model_type) else None,
    )


class MicroBatchSampler(Sampler[tuple[int, ...]]):
    """Samples micro-batches for the data loader, each as one item."""

    def __init__(self, batch_plan: BatchPlan, current_epoch: Callable[[], int]) -> None:
        self.batch_plan = batch_plan
        self.current_epoch = current_epoch

    def __len__(self) -> int:
        plan = self.batch_plan
        return math.ceil(len(plan.lengths) / plan.global_batch) * plan.ranks * plan.accumulation

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return self.batch_plan.micro_batches(self.current_epoch())


class MicroBatchDataset:
    """Looks up micro-batches in a split: an item is the model inputs of several examples."""

    def __init__(self, split: PreparedSplit) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, indices: tuple[int, ...]) -> list[ModelInputs]:
        return self.split.read_rows(indices) or [self._blank]

    @cached_property
    def _blank(self) -> ModelInputs:
        """An example without labels, for a rank without examples: all have to compute."""
        lengths = self.split.lengths
        (row,) = self.split.read_rows([lengths.index(min(lengths))])
        labels = row["labels"]
        ignored = [IGNORE_INDEX] * len(labels) if isinstance(labels, list) else IGNORE_INDEX
        return {**row, "labels": ignored}
