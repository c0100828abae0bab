"""Tests of the interval between checkpoints."""

from __future__ import annotations

import math

import pytest

from hpcft.training.checkpointing import interval


def test_optimal_interval_loses_least_of_all_whole_minutes() -> None:
    """Compares with the sum of the time of saves and of lost steps, computed for each minute."""
    save_s, mtbf_s = 60.0, 24 * 3600.0

    def lost(interval_s: float) -> float:
        # Daly 2006, equation 20: time to solution over time of work, without restarts.
        return mtbf_s / interval_s * math.expm1((interval_s + save_s) / mtbf_s)

    best = min(range(60, 86_400, 60), key=lost)
    assert interval.optimal_interval_s(save_s, mtbf_s) == pytest.approx(best, rel=0.02)


def test_optimal_interval_save_longer_than_time_between_failures_is_that_time() -> None:
    assert interval.optimal_interval_s(10.0, 4.0) == 4.0


def test_checkpoint_interval_number_is_in_minutes_and_zero_means_never() -> None:
    assert interval.checkpoint_interval_s(5, 1.0, 1) == 300
    assert interval.checkpoint_interval_s(0, 1.0, 1) == math.inf


def test_checkpoint_interval_auto_shrinks_with_nodes_below_the_maximum() -> None:
    assert interval.checkpoint_interval_s("auto", 30.0, 1) == interval.MAX_INTERVAL_S
    many = interval.checkpoint_interval_s("auto", 30.0, 1000)
    fewer = interval.checkpoint_interval_s("auto", 30.0, 100)
    assert 0 < many < fewer < interval.MAX_INTERVAL_S
