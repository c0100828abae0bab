"""Slurm's words for the states of jobs."""

from __future__ import annotations

import pytest

from hpcft.scheduler.job_state import JobState, cancelled_by, normalise_state


@pytest.mark.parametrize(
    ("word", "plain"),
    [("CANCELLED by 1000", "CANCELLED"), ("CANCELLED+", "CANCELLED"), (" running ", "RUNNING"),
     ("OUT_OF_ME+", "OUT_OF_ME"), ("", "UNKNOWN"), ("+", "UNKNOWN")],
)  # fmt: skip
def test_normalise_state_returns_the_bare_word(word: str, plain: str) -> None:
    assert normalise_state(word) == plain


@pytest.mark.parametrize(
    ("word", "who"),
    [("CANCELLED by 0", "by root"), ("CANCELLED by 4000000000", "by the user 4000000000"),
     ("CANCELLED+", ""), ("FAILED", "")],
)  # fmt: skip
def test_cancelled_by_names_the_user(word: str, who: str) -> None:
    assert cancelled_by(word) == who


def test_job_state_unknown_is_neither_live_nor_over() -> None:
    state = JobState("UNKNOWN")
    assert not state.is_live
    assert not state.is_over
