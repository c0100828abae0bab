"""Tests of when a training process is asked to stop."""

from __future__ import annotations

import time

from hpcft.training.distributed.stop_signal import StopRequest


def test_has_to_end_nothing_received_is_false() -> None:
    assert not StopRequest().has_to_end(1e9)


def test_has_to_end_after_signal_is_true() -> None:
    assert StopRequest(signum=15).has_to_end(0)


def test_has_to_end_depends_on_time_left_before_deadline() -> None:
    near = StopRequest(deadline=time.time() + 60)
    assert not near.has_to_end(30)
    assert near.has_to_end(90)
