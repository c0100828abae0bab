"""This machine as a scheduler: states of controllers, and finding and ending them."""

from __future__ import annotations

import fcntl
import getpass
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from builders import job_request
from hpcft.core.errors import ClusterError, UsageError
from hpcft.core.paths import log_file
from hpcft.core.records import Attempt, Cluster, Gpu
from hpcft.scheduler import local
from hpcft.scheduler.local import Local, _spawn, queue_file
from real_runs import until


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
        # Its arguments can be read a moment after exec has closed the pipe that Popen waits for.
        until(lambda: psutil.Process(process.pid).cmdline(), 10.0)
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


def site(accelerator: str) -> Cluster:
    """Returns this machine as a cluster, with four GPUs if it has any."""
    gpu = Gpu(name="A100", memory_gib=39.4, compute_capability=8.0)
    return Cluster.model_validate(
        {"name": "local", "scheduler": "local", "accelerator": accelerator, "max_nodes": 1,
         "gpus_per_node": 4, "cores_per_node": 48, "host_memory_gib": 480.0, "gpu": gpu},
    )  # fmt: skip


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
    queue_file().write_text("999999999")
    assert state_of(waiting) == ("PENDING", "is starting"), "the process of the text has ended"
    with queue_file().open("a") as queue:
        fcntl.flock(queue, fcntl.LOCK_EX)
        assert state_of(waiting) == ("PENDING", "is starting"), "the id of an earlier holder"
        queue_file().write_text("")
        assert state_of(waiting) == ("PENDING", "is starting"), "the holder has not written its id"
        queue_file().write_text(str(os.getpid()))
        state, reason = state_of(waiting)
        assert state == "PENDING"
        assert reason.startswith(
            f"waiting for another local run to end (process {os.getpid()}, since "
        )
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


def test_cancel_of_a_run_on_another_machine_is_an_error(tmp_path: Path) -> None:
    (error,) = Local().cancel([attempt(tmp_path, 1, host="elsewhere")])
    assert isinstance(error, ClusterError)
    assert str(error) == "job 1 runs on elsewhere: cancel it there"


def test_cancel_ends_the_controller(tmp_path: Path, controller: subprocess.Popen[bytes]) -> None:
    (tmp_path / "logs").mkdir()
    mine = attempt(tmp_path, controller.pid)
    assert Local().cancel([mine]) == [True]
    assert controller.wait(10) != 0
    assert state_of(mine) == ("CANCELLED", f"by {getpass.getuser()}")
    assert Local().cancel([attempt(tmp_path, controller.pid, process_started=1.0)]) == [False]


def test_check_refuses_more_ranks_than_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    request = job_request(site(accelerator="cuda"), Path("/logs"), [Path("/run")])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,4,5")
    Local().check(request)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    with pytest.raises(UsageError, match=r"needs 4 GPUs .* CUDA_VISIBLE_DEVICES=2,3 leaves 2"):
        Local().check(request)


@pytest.mark.parametrize(
    ("given", "used"),
    [(None, "0,1,2,3"), ("2,3,5,7,11", "2,3,5,7"), ("GPU-a, GPU-b,3,2,1", "GPU-a,GPU-b,3,2")],
)
def test_controller_uses_the_visible_gpus(
    given: str | None, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others may use the GPUs that are not in the list of the session."""
    if given is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    request = job_request(site(accelerator="cuda"), Path("/logs"), [Path("/run")])
    assert local._controller_environment(request, "x")["CUDA_VISIBLE_DEVICES"] == used


def test_controller_has_no_variables_of_a_job_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_END_TIME", "RANK"):
        monkeypatch.setenv(name, "7")
    request = job_request(site(accelerator="cpu"), Path("/logs"), [Path("/run")])
    made = local._controller_environment(request, "x")
    assert not made.keys() & {"SLURM_JOB_ID", "SLURM_RESTART_COUNT", "RANK"}
    assert made["SLURM_JOB_END_TIME"] == "7", "the run ends with the allocation around it"
    assert (made["PYTHONSAFEPATH"], made["PYTHONUTF8"]) == ("1", "1")
