"""Tests of when a training process is asked to stop."""

from __future__ import annotations

import time

import pytest

from fake_slurm import AWAY, fake_commands
from hpcft.training.distributed.stop_signal import StopRequest


def test_has_to_end_nothing_received_is_false() -> None:
    assert not StopRequest().has_to_end(1e9)


def test_has_to_end_after_signal_is_true() -> None:
    assert StopRequest(signum=15).has_to_end(0)


def test_has_to_end_depends_on_time_left_before_deadline() -> None:
    near = StopRequest(deadline=time.time() + 60)
    assert not near.has_to_end(30)
    assert near.has_to_end(90)


def test_has_to_end_asks_slurm_whether_the_limit_was_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = time.time()
    calls = fake_commands(monkeypatch, squeue=f"{now + 3600:.0f}\n")
    request = StopRequest(deadline=now + 60, job_id="14_2")
    assert not request.has_to_end(30)
    assert calls == [], "Slurm is asked only near the limit"
    assert not request.has_to_end(90)
    assert calls == ["squeue -h -j 14_2 -o %e"]
    assert not request.has_to_end(90)
    assert len(calls) == 1, "the new limit is remembered"
    assert request.has_to_end(4000)


def test_has_to_end_while_slurm_does_not_answer_keeps_the_old_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_commands(monkeypatch, squeue=AWAY)
    assert StopRequest(deadline=time.time() + 60, job_id="14").has_to_end(90)
