"""Checks which examples make up a step and how ranks divide them, on different layouts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import datasets
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcft.tasks.base import IGNORE_INDEX
from hpcft.training.data.batch_order import BatchPlan, MicroBatchDataset
from hpcft.training.data.prepare import PreparedSplit


def order_of(lengths: list[int], **changed: Any) -> BatchPlan:
    made: dict[str, Any] = {"global_batch": 8, "strategy": "random", "seed": 1, "epochs": 2,
                            "ranks": 1, "max_accumulation": 1, "max_tokens": None}  # fmt: skip
    return BatchPlan(lengths=lengths, **made | changed)


def by_step(order: BatchPlan, epoch: int) -> Iterator[list[tuple[int, ...]]]:
    """Yields the micro-batches of each step, of all ranks."""
    turns = list(order.micro_batches(epoch))
    each = order.ranks * order.accumulation
    assert len(turns) % each == 0
    return (turns[at : at + each] for at in range(0, len(turns), each))


SOME = st.lists(st.integers(1, 16), min_size=1, max_size=60)
LAYOUTS = [(1, 1, 8), (1, 4, 2), (2, 2, 2), (4, 1, 2), (8, 1, 1)]  # ranks, accumulated, micro-batch


@given(SOME, st.sampled_from(["random", "sequential", "group_by_length"]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_batch_plan_steps_are_the_same_on_every_layout(
    lengths: list[int], strategy: str, packs: bool
) -> None:
    for epoch in (0, 1):
        seen = set()
        for ranks, planned, micro_batch in LAYOUTS:
            room = micro_batch * 16 if packs else None
            order = order_of(lengths, strategy=strategy, ranks=ranks, max_accumulation=planned,
                             max_tokens=room)  # fmt: skip
            assert order.accumulation <= planned
            steps = []
            for groups in by_step(order, epoch):
                for group in groups:
                    if packs:
                        assert sum(lengths[i] for i in group) <= micro_batch * 16
                    else:
                        assert len(group) <= micro_batch
                steps.append(tuple(sorted(i for group in groups for i in group)))
            assert sorted(itertools.chain(*steps)) == list(range(len(lengths)))
            assert all(len(step) == 8 for step in steps if step != steps[-1]) or strategy == (
                "group_by_length"
            )
            seen.add(tuple(steps))
        assert len(seen) == 1


def test_batch_plan_depends_on_epoch_and_seed() -> None:
    lengths = [7] * 40
    one = order_of(lengths)
    assert one.steps(0) == order_of(lengths).steps(0)
    assert one.steps(0) != one.steps(1)
    assert one.steps(0) != order_of(lengths, seed=2).steps(0)
    in_turn = order_of(lengths, strategy="sequential")
    assert [i for step in in_turn.steps(1) for i in step] == list(range(40))


def test_accumulation_short_examples_need_fewer_micro_batches() -> None:
    lengths = [100] + [10, 20, 30] * 21
    order = order_of(lengths, global_batch=64, ranks=2, max_accumulation=16, max_tokens=200,
                     epochs=1)  # fmt: skip
    assert order.accumulation == 4  # 1,360 tokens in 8 × 200, where 32 × 2 examples were planned
    loads = [sum(lengths[i] for i in group) for group in order.micro_batches(0)]
    assert max(loads) - min(loads) <= 10


def test_batch_plan_group_by_length_pads_less_in_random_order() -> None:
    lengths = [5 + 7 * i % 90 for i in range(400)]

    def spread(strategy: str) -> float:
        steps = order_of(lengths, strategy=strategy).steps(0)
        widths = [max(lengths[i] for i in s) - min(lengths[i] for i in s) for s in steps]
        return sum(widths) / len(widths)

    assert spread("group_by_length") < 0.2 * spread("random")
    means = [sum(map(lengths.__getitem__, s)) for s in order_of(
        lengths, strategy="group_by_length").steps(0)]  # fmt: skip
    assert means != sorted(means, reverse=True)


def test_micro_batch_dataset_empty_micro_batch_has_no_labels() -> None:
    """A rank without examples computes the shortest one without its labels."""
    rows = [{"input_ids": [1] * length, "labels": [2] * length} for length in (9, 3, 14)]
    split = PreparedSplit(datasets.Dataset.from_list(rows), [])
    assert split.lengths == [9, 3, 14]
    micro_batches = MicroBatchDataset(split)
    assert micro_batches[2, 0] == [rows[2], rows[0]]
    assert micro_batches[()] == [{"input_ids": [1] * 3, "labels": [IGNORE_INDEX] * 3}]
