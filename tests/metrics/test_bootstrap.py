"""Bootstrap intervals are reproducible, contain the value, and cover the truth as promised."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from hpcft.metrics import compute_metric
from hpcft.metrics.bootstrap import mean_values, with_intervals


def test_intervals_are_reproducible_and_contain_the_value() -> None:
    truth = [i % 3 for i in range(200)]
    predicted = [(i + (i % 5 == 0)) % 3 for i in range(200)]
    first, second = (
        compute_metric(
            "classification", predictions=predicted, references=truth, labels=["a", "b", "c"]
        )
        for _ in range(2)
    )
    assert first == second
    assert set(first["intervals"]) == {"accuracy", "precision", "recall", "f1", "f1_macro",
                                       "f1_micro", "matthews"}  # fmt: skip
    for name, (low, high) in first["intervals"].items():
        assert low < first[name] < high
    low, high = first["intervals"]["accuracy"]
    half = 1.96 * math.sqrt(0.8 * 0.2 / 200)  # a textbook's interval, of the normal distribution
    assert (low, high) == pytest.approx((0.8 - half, 0.8 + half), abs=0.01)


def test_intervals_cover_the_true_mean_about_95_times_in_100() -> None:
    """200 samples with a true mean of 0.7."""
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        sample = (generator.random(80) < 0.7).astype(float)
        low, high = with_intervals(80, mean_values({"x": sample}))["intervals"]["x"]
        covered += low <= 0.7 <= high
    assert 180 <= covered <= 199


def test_interval_of_one_example_has_no_width() -> None:
    assert with_intervals(1, mean_values({"x": [0.25]})) == {
        "x": 0.25, "intervals": {"x": (0.25, 0.25)}
    }  # fmt: skip


def test_large_splits_are_drawn_in_chunks() -> None:
    shapes = []

    def values(drawn: Any) -> dict[str, Any]:
        shapes.append(drawn.shape)
        return {"x": drawn.mean(axis=1)}

    with_intervals(3000, values)
    assert shapes == [(333, 3000), (333, 3000), (333, 3000), (1, 3000), (1, 3000)]
