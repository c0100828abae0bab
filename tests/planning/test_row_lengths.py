"""Tests planned time by the lengths of rows: against the run's own order of batches."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from builders import CLASSIFY, cluster, facts, layout, plan_inputs, plan_of, recipe
from hpcft.planning import step_time
from hpcft.planning.row_lengths import RowLengths
from hpcft.training.data.batch_order import BatchPlan


def lengths_of(rows: list[int], split: str = "train") -> RowLengths:
    return RowLengths(counts={split: dict(Counter(rows))})


SKEWED = [min(128, 8 + int(random.Random(n).expovariate(1 / 20))) for n in range(2000)]


def test_row_lengths_are_those_of_the_sample() -> None:
    known = lengths_of([1, 2, 3, 4, 100])
    assert known.mean("train") == 22
    assert [known.quantile("train", share) for share in (0.0, 0.2, 0.21, 0.8, 0.81, 1.0)] == [
        1, 1, 2, 4, 100, 100,
    ]  # fmt: skip
    assert known.describe("train") == "5 rows of train: 22 tokens on average, 100 at most"
    assert RowLengths.model_validate_json(known.model_dump_json()) == known


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
@pytest.mark.parametrize(("micro", "ranks", "accumulation"), [
    (8, 1, 1), (1, 1, 8), (4, 2, 2), (2, 1, 16), (1, 4, 1), (16, 2, 1),
])  # fmt: skip
def test_padded_tokens_are_those_of_the_runs_batches(
    strategy: str, micro: int, ranks: int, accumulation: int
) -> None:
    """Of the micro-batches that the ranks run at the same time the longest decides."""
    order = BatchPlan(
        lengths=SKEWED, global_batch=micro * ranks * accumulation, strategy=strategy, seed=1,
        epochs=1, ranks=ranks, max_accumulation=accumulation, max_tokens=None,
    )  # fmt: skip
    longest = [max((SKEWED[i] for i in batch), default=0) for batch in order.micro_batches(0)]
    turns = [max(longest[at : at + ranks]) for at in range(0, len(longest), ranks)]
    measured = sum(turns) / len(turns)
    train = {"global_batch_size": order.global_batch, "train_sampling_strategy": strategy}
    inputs = plan_inputs(recipe(train=train), lengths=lengths_of(SKEWED))
    chosen = layout(
        0, ranks, per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation
    )
    planned = inputs.padded_tokens(chosen)
    assert planned == pytest.approx(measured, rel=0.12)


def test_time_is_planned_by_the_rows_and_memory_by_max_length() -> None:
    made = recipe(task=CLASSIFY | {"max_length": 512}, resources={"gpus_per_node": 1})
    short = plan_of(made, cluster("a100-80"), facts(), lengths=lengths_of([32] * 9))
    bound = plan_of(made, cluster("a100-80"), facts())
    assert short.layout == bound.layout
    assert short.gpu_memory == bound.gpu_memory
    assert short.time is not None
    assert bound.time is not None
    ratio = bound.time.step.compute_s / short.time.step.compute_s
    assert 8 < ratio < 20, "a sixteenth of the tokens, and the start of kernels"
    assert short.tokens_per_step == 32 * made.train.global_batch_size
    assert bound.tokens_per_step == 512 * made.train.global_batch_size
    assert (
        "time by 9 rows of train: 32 tokens on average, 32 at most, 32 in a micro-batch; "
        "memory by max_length 512" in short.reasons
    )
    assert (
        "time by every row having max_length 512 tokens, because no rows are at hand; "
        "memory by max_length 512" in bound.reasons
    )


def test_more_shots_do_not_make_a_plan_shorter() -> None:
    """A prompt's own tokens decide, since those of the shots are run once."""
    seconds = []
    for length, shots in ((256, 0), (2048, 8)):
        task: dict[str, Any] = {
            "name": "prompting", "prompt": "{text}", "labels": ["a", "b"], "shots": shots,
            "max_length": length, "data": {"path": "x/y"},
        }  # fmt: skip
        made = recipe(task=task, method={"name": "frozen"})
        inputs = plan_inputs(made, lengths=lengths_of([40] * 9, "test"))
        assert inputs.padded_tokens(layout(0)) == 40
        seconds.append(step_time.micro_batch_flops(inputs, layout(0)))
    assert seconds[0] == seconds[1]
