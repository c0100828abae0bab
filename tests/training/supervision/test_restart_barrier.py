"""Tests of the barrier of all supervisors before a restart."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from builders import cluster, facts, plan_of, recipe, submitted_run
from hpcft.core.files import read_record, write_record
from hpcft.core.rank_errors import read_rank_errors
from hpcft.core.records import Progress
from hpcft.recovery.run import Run
from hpcft.training.distributed.rank_env import RankInfo
from hpcft.training.supervision import restart_barrier
from hpcft.training.supervision.restart_barrier import record_slurm_restart, wait_for_all_ranks


@pytest.fixture
def run(workplace: Path) -> Run:
    """A run without recoveries."""
    made, profile = recipe(), cluster("local")
    return submitted_run(workplace, made, profile, plan_of(made, profile, facts(1_000_000)))


def rank(number: int, ranks: int = 2) -> RankInfo:
    return RankInfo(number, ranks, number, f"n{number}", "77")


def never() -> bool:
    return False


def always() -> bool:
    return True


def test_wait_for_all_ranks_waits_for_the_last_one(run: Run) -> None:
    with ThreadPoolExecutor() as pool:
        first = pool.submit(wait_for_all_ranks, run, rank(0), 1, never)
        assert not first.done()
        assert wait_for_all_ranks(run, rank(1), 1, never)
        assert first.result(timeout=10)


def test_wait_for_all_ranks_of_another_restart_does_not_count(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restart_barrier, "READY_S", 0.3)
    assert wait_for_all_ranks(run, rank(0, ranks=1), 1, never)
    with pytest.raises(TimeoutError, match=r"needs all 3 ranks; after 0 s .* not ready: 1, 2; see"):
        wait_for_all_ranks(run, rank(0, ranks=3), 2, never)


def test_wait_for_all_ranks_after_a_stop_signal_returns_false(run: Run) -> None:
    assert not wait_for_all_ranks(run, rank(0), 1, always)


def test_wait_for_all_ranks_keeps_the_progress_fresh(run: Run) -> None:
    stale = Progress(phase="training", updated_at=1.0, started_at=1.0, step=7)
    write_record(run.paths.progress, stale)
    assert not wait_for_all_ranks(run, rank(0), 1, always)
    fresh = read_record(run.paths.progress, Progress)
    assert (fresh.phase, fresh.step) == ("starting", 7)
    assert fresh.updated_at > 1.0


@pytest.fixture
def restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm has restarted this job once."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")


def test_record_slurm_restart_without_a_restart_writes_nothing(run: Run) -> None:
    assert record_slurm_restart(run, rank(0), never)
    assert run.read_recoveries() == []


@pytest.mark.usefixtures("restarted")
def test_record_slurm_restart_is_written_by_rank_0_once(run: Run) -> None:
    stop = threading.Event()
    with ThreadPoolExecutor() as pool:
        other = pool.submit(record_slurm_restart, run, rank(1), stop.is_set)
        assert record_slurm_restart(run, rank(0), never)
        assert other.result(timeout=10)
    assert record_slurm_restart(run, rank(0), never)
    (recovery,) = run.read_recoveries()
    assert (recovery.action, recovery.cause, recovery.restart) == ("requeue", "interrupted", 1)
    assert run.read_plan().recovery_number == 1


@pytest.mark.usefixtures("restarted")
def test_record_slurm_restart_after_a_stop_signal_returns_false(run: Run) -> None:
    assert not record_slurm_restart(run, rank(1), always)


def test_record_slurm_restart_may_precede_the_first_checkpoint_several_times(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for restart in range(1, 21):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        assert record_slurm_restart(run, rank(0), never)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "21")
    assert not record_slurm_restart(run, rank(0), never)
    (error,) = read_rank_errors(run.paths)
    assert error.failure == "stuck"
    assert error.message.endswith("by hand); no progress past step 0 after 20 restarts")
    assert "stacks" not in error.next_step
    assert "resources.checkpoint_min" in error.next_step
    assert len(run.read_recoveries()) == 20
