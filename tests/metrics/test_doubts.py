"""Tests of the reasons to doubt a result."""

from __future__ import annotations

import pytest

from hpcft.metrics.doubts import find_doubts


@pytest.mark.parametrize(
    ("losses", "doubted"),
    [
        ([2.08, 40.0, 700.0, 1221.0], "its loss rose from 2.08 to 960.5"),
        ([0.69, 8.2, 150.7, 53.3, 52.6, 31.4, 26.0, 29.0], "its loss rose from 0.69 to 30.2"),
        ([2.08, 1221.0], "its loss rose from 2.08 to 1221"),
        ([2.0, 1.0, 0.5, 0.2], ""),
        ([0.01, 0.02, 0.05, 0.1], ""),  # A model that was good before; the losses are noise.
        ([0.7, 0.9, 0.6, 0.8, 0.7, 0.9, 0.7, 0.8, 0.9, 1.2, 3.0], ""),  # One bad batch.
        ([3.0], ""),
        ([], ""),
    ],
)
def test_find_doubts_of_losses_that_rise(losses: list[float], doubted: str) -> None:
    found = find_doubts(losses, {}, 0)
    assert len(found) == bool(doubted)
    assert doubted in "".join(found)


@pytest.mark.parametrize(
    ("accuracy", "majority", "examples", "is_doubted"),
    [
        (0.30, 0.70, 1000, True),
        (0.69, 0.70, 1000, False),  # within chance
        (0.69, 0.70, 1_000_000, True),
        (0.20, 0.50, 4, False),
        (0.91, 0.70, 1000, False),
    ],
)
def test_find_doubts_of_an_accuracy_below_the_majority(
    accuracy: float, majority: float, examples: int, is_doubted: bool
) -> None:
    metrics = {"accuracy": accuracy, "majority": majority}
    assert len(find_doubts([], metrics, examples)) == is_doubted
    assert find_doubts([], {"accuracy": accuracy}, examples) == []
