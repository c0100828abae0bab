"""Tests of the recovery log in a run folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from builders import cluster, facts, plan_of, recipe
from hpcft.core.errors import StoreError
from hpcft.core.files import read_record
from hpcft.core.paths import RunPaths
from hpcft.core.records import Plan, RankError
from hpcft.planning import oom_fallback
from hpcft.recovery.log import append_recovery, read_recoveries, saved_step


def append(paths: RunPaths, plan: Plan, number: int) -> bool:
    error = RankError.now(0, "Died", "killed", job_id="1")
    return append_recovery(
        paths, plan, plan, number=number, action="restart", error=error, cause="rank_died"
    )


def test_append_recovery_by_two_ranks_writes_one(workplace: Path) -> None:
    made, profile = recipe(), cluster("a100-80")
    paths = RunPaths(workplace)
    plan = plan_of(made, profile, facts(100_000_000))
    fallback = oom_fallback.next_fallback(plan, made, profile, "step")
    assert fallback is not None
    written = [
        append_recovery(
            paths,
            plan,
            fallback,
            number=1,
            action="restart",
            error=RankError.now(rank, "OutOfMemoryError", "no memory"),
        )
        for rank in range(2)
    ]
    assert written == [True, False]
    (recovery,) = read_recoveries(paths)
    change = oom_fallback.describe_change(plan, fallback)
    assert (recovery.number, recovery.rank, recovery.change) == (1, 0, change)
    current = read_record(paths.current_plan, Plan)
    assert current == fallback.model_copy(update={"recovery_number": 1})


def test_read_recoveries_sorts_by_number(workplace: Path) -> None:
    paths = RunPaths(workplace)
    plan = plan_of(recipe(), cluster("a100-80"), facts(100_000_000))
    for number in (10, 9, 2):
        assert append(paths, plan, number)
    assert [recovery.number for recovery in read_recoveries(paths)] == [2, 9, 10]


def test_read_recoveries_of_a_damaged_file_raises(workplace: Path) -> None:
    paths = RunPaths(workplace)
    append(paths, plan_of(recipe(), cluster("a100-80"), facts(100_000_000)), 1)
    (paths.recoveries / "2.json").write_text("{")
    with pytest.raises(StoreError, match=r"2\.json: is damaged .* current plan is not known: "):
        read_recoveries(paths)


def test_read_recoveries_skips_a_file_that_was_removed_meanwhile(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = RunPaths(workplace)
    append(paths, plan_of(recipe(), cluster("a100-80"), facts(100_000_000)), 1)
    listed = [paths.recoveries / "1.json", paths.recoveries / "2.json"]
    monkeypatch.setattr(Path, "glob", lambda *_: iter(listed))
    assert [recovery.number for recovery in read_recoveries(paths)] == [1]


def test_saved_step_without_a_complete_checkpoint_is_0(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    assert saved_step(paths) == 0
    (paths.checkpoints / "checkpoint-10").mkdir(parents=True)
    assert saved_step(paths) == 0


def test_saved_step_counts_complete_answers(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    paths.answers.mkdir()
    for rank, count in enumerate((3, 2)):
        (paths.answers / f"{rank}.jsonl").write_text('[1, "a"]\n' * count + "[7, ")
    assert saved_step(paths) == 5
