"""Tests of a rank's supervisor: what it does if the run folder does not allow to continue."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Timer

import pytest

from builders import cluster, facts, plan_of, recipe, submitted_run
from hpcft.core.errors import StoreError
from hpcft.core.rank_errors import read_rank_errors
from hpcft.core.records import RankError
from hpcft.recovery.log import append_recovery
from hpcft.recovery.run import Run
from hpcft.training.distributed.worker_channel import HeartbeatSender
from hpcft.training.supervision import supervisor
from hpcft.training.supervision.watchdog import Watchdog

UNREADABLE = "recoveries/1.json: is damaged"
RANK = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "77", "SUBMITIT_LOCAL_NTASKS": "1",
        "SUBMITIT_LOCAL_JOB_NUM_NODES": "1", "SUBMITIT_LOCAL_GLOBALID": "0",
        "SUBMITIT_LOCAL_LOCALID": "0", "SUBMITIT_LOCAL_NODEID": "0"}  # fmt: skip


@pytest.fixture
def run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A local run of one rank, whose recovery cannot be read."""
    for name, value in RANK.items():
        monkeypatch.setenv(name, value)
    made, profile = recipe(), cluster("local")
    plan = plan_of(made, profile, facts(1_000_000))
    run = submitted_run(workplace, made, profile, plan)
    damage_recovery(run)
    return run


def damage_recovery(run: Run) -> None:
    run.paths.recoveries.mkdir(exist_ok=True)
    (run.paths.recoveries / "1.json").write_text("{")


def fail_to_start(*_: object, **__: object) -> None:
    raise AssertionError("a worker was started")


def assert_fails(run: Run) -> None:
    """The supervisor of the rank ends with exit code 1, and its error file names the recovery."""
    with pytest.raises(SystemExit, match="1"):
        supervisor.main(str(run.paths.folder))
    (error,) = read_rank_errors(run.paths)
    assert (error.rank, error.kind, error.job_id) == (0, "DataError", "77")
    assert UNREADABLE in error.message
    assert "current plan is not known: restore the file, or start the run" in error.message


@pytest.fixture(autouse=True)
def _own_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor's signal handlers do not outlive its test."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)


def test_main_with_an_unreadable_recovery_starts_no_worker(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "WorkerProcess", fail_to_start)
    assert_fails(run)


class EndlessWorker:
    """A worker that runs until it is ended; `on_wait` is called while it runs."""

    def __init__(self, on_wait: Callable[[], None]) -> None:
        self.on_wait = on_wait
        self.has_ended = False

    def wait(self, _timeout_s: float) -> None:
        self.on_wait()

    def end(self, *, at_once: bool) -> None:
        self.has_ended = True


def test_main_ends_the_worker_when_a_recovery_becomes_unreadable(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run.paths.recoveries / "1.json").unlink()
    worker = EndlessWorker(lambda: damage_recovery(run))
    monkeypatch.setattr(supervisor, "FOLDER_POLL_S", 0.0)
    monkeypatch.setattr(supervisor, "WorkerProcess", lambda *_, **__: worker)
    assert_fails(run)
    assert worker.has_ended


def test_main_with_an_unreadable_recipe_writes_the_error_file(run: Run) -> None:
    run.paths.recipe.write_text("{}")
    with pytest.raises(SystemExit, match="1"):
        supervisor.main(str(run.paths.folder))
    (error,) = read_rank_errors(run.paths)
    assert "recipe.json: is damaged" in error.message


def test_main_writes_nothing_into_a_folder_that_others_may_write_to(run: Run) -> None:
    run.paths.folder.chmod(0o777)
    with pytest.raises(StoreError, match="others may write to it"):
        supervisor.main(str(run.paths.folder))
    assert not run.paths.errors.exists()


def test_worker_with_an_unreadable_recovery_ends_with_its_error(run: Run) -> None:
    """A worker that its supervisor started before the recovery was written reads it too."""
    stacks, heartbeats = os.memfd_create("stacks"), os.memfd_create("heartbeats")
    arguments = [run.paths.folder, 1, os.getpid(), heartbeats, stacks]
    done = subprocess.run(
        [sys.executable, "-m", "hpcft.training.worker", *map(str, arguments)],
        pass_fds=(stacks, heartbeats),
        capture_output=True,
        text=True,
        check=False,
    )
    for descriptor in (stacks, heartbeats):
        os.close(descriptor)
    assert done.returncode == 1
    assert "StoreError" in done.stderr
    (error,) = read_rank_errors(run.paths)
    assert error.kind == "DataError"
    assert UNREADABLE in error.message


def test_main_continues_with_the_plan_of_the_last_recovery(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run.paths.recoveries / "1.json").unlink()
    plan = run.read_plan()
    error = RankError.now(0, "Died", "killed", job_id="77")
    append_recovery(run.paths, plan, plan, number=1, action="restart", error=error,
                    cause="rank_died", step=3)  # fmt: skip
    started = []

    class DoneWorker(EndlessWorker):
        def __init__(self, _paths: object, restart_index: int, *_: object, **__: object) -> None:
            super().__init__(lambda: None)
            started.append(restart_index)

        def wait(self, _timeout_s: float) -> int:  # type: ignore[override]
            return 0

    monkeypatch.setattr(supervisor, "WorkerProcess", DoneWorker)
    supervisor.main(str(run.paths.folder))
    assert started == [1]
    assert read_rank_errors(run.paths) == []


# ---------------------------------------------------------------- after the end


class CrashingWorker(EndlessWorker):
    """A worker that crashes at its exit; what it does before is `work`."""

    work: Callable[[Run, Watchdog], None]
    run: Run
    starts = 0

    def __init__(self, _paths: object, _index: int, watchdog: Watchdog, **_: object) -> None:
        super().__init__(lambda: None)
        type(self).starts += 1
        type(self).work(self.run, watchdog)

    def wait(self, _timeout_s: float) -> int:  # type: ignore[override]
        return -signal.SIGSEGV


def write_result(run: Run, _watchdog: Watchdog | None = None) -> None:
    run.paths.result.write_text("{}")


def report_done(run: Run, watchdog: Watchdog) -> None:
    """Reports the end, as ranks other than the first one do; rank 0 writes the result later."""
    HeartbeatSender(watchdog.worker_fds[0]).send("done", 3)
    Timer(0.5, write_result, [run]).start()


@pytest.mark.parametrize("work", [write_result, report_done])
def test_main_takes_a_crash_after_the_end_for_the_end(
    run: Run, monkeypatch: pytest.MonkeyPatch, work: Callable[[Run, Watchdog], None]
) -> None:
    (run.paths.recoveries / "1.json").unlink()
    monkeypatch.setattr(supervisor, "WorkerProcess", CrashingWorker)
    for name, value in {"work": staticmethod(work), "run": run, "starts": 0}.items():
        monkeypatch.setattr(CrashingWorker, name, value, raising=False)
    supervisor.main(str(run.paths.folder))
    assert CrashingWorker.starts == 1
    assert run.read_recoveries() == []
    assert read_rank_errors(run.paths) == []


def test_main_of_a_complete_run_starts_no_worker(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm restarts a job whose node fails after the result was written."""
    (run.paths.recoveries / "1.json").unlink()
    write_result(run)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(supervisor, "WorkerProcess", fail_to_start)
    supervisor.main(str(run.paths.folder))
    assert run.read_recoveries() == []
