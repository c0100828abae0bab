"""This machine as a scheduler: states of controllers, and finding and ending them."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from hpcft.core.errors import ClusterError
from hpcft.core.paths import log_file
from hpcft.core.records import Attempt
from hpcft.scheduler.local import Local, _spawn, queue_file


@pytest.fixture(autouse=True)
def own_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other runs of this machine do not count."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    queue_file().parent.mkdir(parents=True)


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that looks like the controller of the run in `tmp_path`, and sleeps."""
    package = tmp_path / "made"
    package.mkdir()
    (package / "local_controller.py").write_text("import time\ntime.sleep(60)\n")
    with subprocess.Popen(
        [sys.executable, "-m", "made.local_controller", str(tmp_path / "logs")],
        cwd=tmp_path, start_new_session=True,
    ) as process:  # fmt: skip
        yield process
        process.kill()


def attempt(folder: Path, pid: int | None, **changes: object) -> Attempt:
    """Returns the attempt whose controller is this process."""
    started = psutil.Process(pid).create_time() if pid and psutil.pid_exists(pid) else None
    made = Attempt(
        job_id=str(pid) if pid else None, token="t", submitted_at=1.0, logs=str(folder / "logs"),
        host=os.uname().nodename, process_started=started,
    )  # fmt: skip
    return made.model_copy(update=changes)


def state_of(attempt: Attempt) -> tuple[str, str]:
    """Returns the state of an attempt, and the reason."""
    (state,) = Local().states([attempt])
    return state.state, state.reason


def write_log(folder: Path, pid: int) -> None:
    """Writes the log that rank 0 opens when it starts."""
    (folder / "logs").mkdir()
    log_file(folder / "logs", str(pid), 0, "out").touch()


def test_states_of_a_controller_whose_ranks_have_a_log_is_running(
    tmp_path: Path, controller: subprocess.Popen[bytes]
) -> None:
    write_log(tmp_path, controller.pid)
    assert state_of(attempt(tmp_path, controller.pid)) == ("RUNNING", "")


def test_states_of_a_process_that_started_at_another_time_is_over(
    tmp_path: Path, controller: subprocess.Popen[bytes]
) -> None:
    """Its process id was given to another process since."""
    assert state_of(attempt(tmp_path, controller.pid, process_started=1.0)) == ("COMPLETED", "")
    assert state_of(attempt(tmp_path, 999_999_999)) == ("COMPLETED", "")


def test_states_of_an_attempt_on_another_machine_is_unknown(tmp_path: Path) -> None:
    assert state_of(attempt(tmp_path, 1, host="elsewhere")) == (
        "UNKNOWN", "runs on elsewhere: look there",
    )  # fmt: skip


def test_states_of_an_attempt_without_a_process_was_not_queued(tmp_path: Path) -> None:
    assert state_of(attempt(tmp_path, None)) == (
        "FAILED", "was not queued: the submitting command was interrupted",
    )  # fmt: skip


def test_states_says_that_a_run_waits_only_if_another_one_has_the_lock(
    tmp_path: Path, controller: subprocess.Popen[bytes]
) -> None:
    waiting = attempt(tmp_path, controller.pid)
    assert state_of(waiting) == ("PENDING", "is starting")
    queue_file().write_text("12345")
    assert state_of(waiting) == ("PENDING", "is starting"), "the process of the text has ended"
    with queue_file().open("a") as queue:
        fcntl.flock(queue, fcntl.LOCK_EX)
        assert state_of(waiting) == ("PENDING", "waiting for another local run to end")
        queue_file().write_text(str(controller.pid))
        assert state_of(waiting) == ("PENDING", "is starting")


def test_spawn_leaves_no_open_file_to_the_controller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock that `flock` or a shell left open here would be held as long as the run."""
    listed = tmp_path / "listed"
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\ncd /proc/$$/fd; ls -l | grep -c lock > {listed}.now\n"
                       f"mv {listed}.now {listed}\n")  # fmt: skip
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with (tmp_path / "lock").open("w") as lock:
        os.set_inheritable(lock.fileno(), True)
        pid = int(_spawn(tmp_path, dict(os.environ)))
        os.waitpid(pid, 0)
    assert listed.read_text() == "0\n"


def test_find_jobs_finds_the_controller_by_its_folder(
    tmp_path: Path, controller: subprocess.Popen[bytes]
) -> None:
    lost, absent = attempt(tmp_path, None), attempt(tmp_path / "other", None)
    assert Local().find_jobs([lost, absent]) == [str(controller.pid), None]
    assert Local().find_jobs([]) == []
    write_log(tmp_path, controller.pid)
    found = lost.model_copy(update={"job_id": str(controller.pid)})
    assert state_of(found) == ("RUNNING", ""), "although its start time was not recorded"
    assert state_of(lost.model_copy(update={"job_id": str(os.getpid())})) == ("COMPLETED", "")


def test_cancel_of_a_run_on_another_machine_raises(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="job 1 runs on elsewhere: cancel it there"):
        Local().cancel(attempt(tmp_path, 1, host="elsewhere"))


def test_cancel_ends_the_controller(tmp_path: Path, controller: subprocess.Popen[bytes]) -> None:
    assert Local().cancel(attempt(tmp_path, controller.pid))
    assert controller.wait(10) != 0
    assert not Local().cancel(attempt(tmp_path, controller.pid, process_started=1.0))
