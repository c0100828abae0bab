"""Tests of a run folder as its ranks see it: the plan that runs now, and recoveries."""

from __future__ import annotations

from pathlib import Path

import pytest

from builders import cluster, facts, plan_of, recipe, submitted_run
from hpcft.core.errors import StoreError
from hpcft.core.files import read_record
from hpcft.core.records import Plan, RankError
from hpcft.planning import oom_fallback
from hpcft.recovery.log import append_recovery, record_resume
from hpcft.recovery.run import Run


@pytest.fixture
def run(workplace: Path) -> Run:
    """A run on a GPU that was submitted and has no recovery."""
    made, profile = recipe(), cluster("a100-80")
    return submitted_run(workplace, made, profile, plan_of(made, profile, facts(100_000_000)))


def fall_back(run: Run, number: int) -> Plan:
    """Applies the next fallback; returns the new plan."""
    before = run.read_plan()
    after = oom_fallback.next_fallback(before, run.recipe, run.cluster, "step")
    assert after is not None
    append_recovery(
        run.paths,
        before,
        after,
        number=number,
        action="restart",
        error=RankError.now(0, "OutOfMemoryError", "no memory"),
    )
    return after


def number_of(plan: Plan, number: int) -> Plan:
    return plan.model_copy(update={"recovery_number": number})


def test_read_plan_without_recoveries_is_the_submitted_plan(run: Run) -> None:
    assert run.read_plan() == read_record(run.paths.plan, Plan)


def test_read_plan_after_a_fallback_is_the_current_plan(run: Run) -> None:
    submitted = run.read_plan()
    first = fall_back(run, 1)
    assert run.read_plan() == number_of(first, 1)
    second = fall_back(run, 2)
    assert run.read_plan() == number_of(second, 2)
    assert read_record(run.paths.plan, Plan) == submitted, "the submitted plan is kept"


@pytest.mark.parametrize("current_plan", ["missing", "older"])
def test_read_plan_follows_a_recovery_that_the_current_plan_does_not_know(
    run: Run, current_plan: str
) -> None:
    """hpcft 0.1 wrote no current plan, and a rank may die before it has written it."""
    fall_back(run, 1)
    older = run.paths.current_plan.read_text()
    after = fall_back(run, 2)
    if current_plan == "missing":
        run.paths.current_plan.unlink()
    else:
        run.paths.current_plan.write_text(older)
    plan = run.read_plan()
    assert (plan.layout, plan.ds_config) == (after.layout, after.ds_config)
    assert plan.per_device_eval_batch_size == after.per_device_eval_batch_size
    assert (plan.gpu_peak_bytes, plan.time) == (None, None), "nobody predicted this layout"


def test_read_plan_with_an_unreadable_recovery_raises(run: Run) -> None:
    fall_back(run, 1)
    (run.paths.recoveries / "1.json").write_text("not JSON")
    with pytest.raises(StoreError, match=r"1\.json: is damaged .* current plan is not known"):
        run.read_plan()


def test_read_plan_with_an_unreadable_current_plan_raises(run: Run) -> None:
    fall_back(run, 1)
    run.paths.current_plan.write_text("{}")
    with pytest.raises(StoreError, match=r"current_plan\.json: is damaged"):
        run.read_plan()


def test_read_planned_bytes_after_a_fallback_is_the_submitted_prediction(run: Run) -> None:
    submitted = run.read_plan().gpu_peak_bytes
    assert submitted is not None
    fall_back(run, 1)
    assert run.read_plan().gpu_peak_bytes is None
    assert run.read_planned_bytes() == submitted


def test_remove_last_recovery_restores_the_plan_before_it(run: Run) -> None:
    submitted = run.read_plan()
    first = fall_back(run, 1)
    fall_back(run, 2)
    before = run.remove_last_recovery()
    assert before.layout == first.layout
    assert run.read_plan() == number_of(before, 1)
    assert run.remove_last_recovery() == submitted
    assert (run.read_plan(), run.read_recoveries()) == (submitted, [])


def test_remove_last_recovery_keeps_the_recovery_if_the_plan_cannot_be_written(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the recovery, its plan would stay the current one."""
    after = fall_back(run, 1)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hpcft.recovery.run.write_current_plan", fail)
    with pytest.raises(OSError, match="No space left"):
        run.remove_last_recovery()
    assert run.has_recovery(1)
    assert run.read_plan() == number_of(after, 1)


def test_record_resume_makes_the_new_plan_the_current_one(run: Run) -> None:
    fall_back(run, 1)
    plan = read_record(run.paths.plan, Plan)
    record_resume(run.paths, plan, "a person resumed it")
    assert run.read_plan() == number_of(plan, 2)
    assert [recovery.action for recovery in run.read_recoveries()] == ["restart", "resume"]


def test_open_of_a_folder_that_others_may_write_to_raises(run: Run) -> None:
    run.paths.folder.chmod(0o777)
    with pytest.raises(StoreError, match="others may write to it"):
        Run.open(run.paths.folder)
