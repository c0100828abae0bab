"""The order of the training examples: which make up a step, and how ranks divide them.

The examples of a step depend on the seed, the epoch and the global batch, never on the layout; and
losses are sums over a step's examples. So a run on other ranks, or with other micro-batches, takes
the same steps up to rounding. Within a step the examples are divided such that ranks wait little
for each other and little is padded:

- padded, micro-batches hold equally many examples, of similar length;
- packed, they hold equally many tokens, and as a micro-batch has room for `micro-batch ×
  max_length` tokens, as planned, a step needs fewer of them where examples are shorter.
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
from hpcft.tasks.base import IGNORED, ModelInputs
from hpcft.training.data.prepare import PreparedSplit

Group = list[int]
"""Indices of examples."""
GROUPED_STEPS = 50
"""`group_by_length` sorts so many global batches at once, as `transformers` does."""


@dataclass(frozen=True)
class BatchPlan:
    """The order of a run's training examples."""

    lengths: Sequence[int]
    """Tokens of each example."""
    global_batch: int
    """Examples of a step."""
    strategy: str
    """`train.train_sampling_strategy`."""
    seed: int
    """`train.seed`."""
    epochs: int
    """Epochs of the run; the last may end early."""
    ranks: int
    """Ranks in all."""
    planned: int
    """Micro-batches that a step has room for on each rank."""
    most_tokens: int | None = None
    """Tokens of a packed micro-batch at most; None: micro-batches are padded."""

    def steps(self, epoch: int) -> list[Group]:
        """The examples of each step of an epoch."""
        draw = random.Random(f"{self.seed}/{epoch}")
        size, count = self.global_batch, len(self.lengths)
        order = list(range(count))
        if self.strategy != "sequential":
            draw.shuffle(order)
        if self.strategy == "group_by_length":
            # At least four windows, where there is enough: else every epoch sorts the same.
            window = size * max(1, min(GROUPED_STEPS, count // (4 * size)))
            parts = [order[at : at + window] for at in range(0, count, window)]
            order = [index for part in parts for index in self._longest_first(part)]
        steps = [order[at : at + size] for at in range(0, count, size)]
        if self.strategy == "group_by_length":
            draw.shuffle(steps)
        return steps

    @cached_property
    def accumulation(self) -> int:
        """Micro-batches of a step on each rank, the fewest in which every step finds room.

        There always is room in as many as were planned: an example goes to the emptiest
        micro-batch, and if that had less room than `max_length`, all of them would hold at least
        `micro-batch` examples, and so the whole step.
        """
        if self.most_tokens is None:
            return self.planned
        found = 1
        for epoch in range(self.epochs):
            for step in self.steps(epoch):
                while found < self.planned and not self._fits(step, found):
                    found += 1
        return found

    def micro_batches(self, epoch: int) -> Iterator[tuple[int, ...]]:
        """Those of an epoch, in the order in which ranks take turns: some are empty at its end."""
        for step in self.steps(epoch):
            yield from map(tuple, self._divided(step, self.accumulation))

    def _fits(self, step: Group, accumulation: int) -> bool:
        loads = [sum(map(self._length, group)) for group in self._divided(step, accumulation)]
        return self.most_tokens is None or max(loads) <= self.most_tokens

    def _divided(self, step: Group, accumulation: int) -> list[Group]:
        count = self.ranks * accumulation
        ordered = self._longest_first(step)
        if self.most_tokens is None:
            ends = [len(step) * number // count for number in range(count + 1)]
            return [ordered[ends[i] : ends[i + 1]] for i in range(count)]
        # Longest first, each to the emptiest (Graham 1969, doi:10.1137/0117039).
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
    """The order of a run's training examples.

    Args:
        recipe: of the run.
        plan: what runs now.
        lengths: tokens of each example.
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
        planned=layout.gradient_accumulation_steps,
        most_tokens=room if recipe.packs(plan.facts.model_type) else None,
    )


class MicroBatches(Sampler[tuple[int, ...]]):
    """An order as the data loader asks for it: one item is a micro-batch."""

    def __init__(self, order: BatchPlan, epoch: Callable[[], int]) -> None:
        self.order = order
        self.epoch = epoch

    def __len__(self) -> int:
        order = self.order
        steps = -(-len(order.lengths) // order.global_batch)
        return steps * order.ranks * order.accumulation

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return self.order.micro_batches(self.epoch())


class MicroBatchDataset:
    """A split whose items are micro-batches: the features of the examples with these indices."""

    def __init__(self, split: PreparedSplit) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, indices: tuple[int, ...]) -> list[ModelInputs]:
        return self.split.rows(indices) or [self._blank]

    @cached_property
    def _blank(self) -> ModelInputs:
        """An example without labels: ranks compute together, also where one has nothing left."""
        lengths = self.split.lengths
        (row,) = self.split.rows([lengths.index(min(lengths))])
        labels = row["labels"]
        ignored = [IGNORED] * len(labels) if isinstance(labels, list) else IGNORED
        return {**row, "labels": ignored}
