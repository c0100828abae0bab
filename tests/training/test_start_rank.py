"""Tests of the start of a rank: it runs what was submitted, or nothing."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from builders import cluster, job_request
from hpcft.core.errors import StoreError
from hpcft.scheduler.protocol import JobRequest
from hpcft.scheduler.sbatch import rank_command, runs_file, runs_text
from hpcft.training import entry, requeue, start_rank

LOCAL = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "17", "SUBMITIT_LOCAL_NTASKS": "1",
         "SUBMITIT_LOCAL_GLOBALID": "0", "SUBMITIT_LOCAL_LOCALID": "0",
         "SUBMITIT_LOCAL_NODEID": "0", "SUBMITIT_LOCAL_JOB_NUM_NODES": "1"}  # fmt: skip


@pytest.fixture
def request_of_two(tmp_path: Path) -> JobRequest:
    """A submitted array of two runs, whose folders are empty."""
    runs = [tmp_path / "runs" / "made" / name for name in ("aaaa0000", "bbbb1111")]
    logs = tmp_path / "runs" / "made" / "sweep-0123"
    for folder in (*runs, logs):
        folder.mkdir(parents=True, mode=0o700)
    made = job_request(cluster("a100-80"), logs, runs)
    runs_file(made).write_text(runs_text(made))
    return made


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The run folders that ranks were started with."""
    folders: list[str] = []
    monkeypatch.setattr(entry, "start", folders.append)
    for name, value in LOCAL.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    before = {signum: signal.getsignal(signum) for signum in start_rank.STOP_SIGNALS}
    yield folders
    for signum, handler in before.items():
        signal.signal(signum, handler)


def arguments_of(request: JobRequest) -> list[str]:
    """Returns the arguments that the script of a job gives to each rank."""
    command = rank_command(request, "python").split()
    assert command[:4] == ["python", "-u", "-m", "hpcft.training.start_rank"]
    return command[4:]


def test_start_rank_starts_the_run_of_its_array_element(
    request_of_two: JobRequest, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start_rank.main(*arguments_of(request_of_two))
    slurm = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "5", "SLURM_ARRAY_JOB_ID": "4",
             "SLURM_ARRAY_TASK_ID": "1"}  # fmt: skip
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    start_rank.main(*arguments_of(request_of_two))
    assert started == [str(run) for run in request_of_two.runs]


def test_start_rank_with_another_list_of_runs_is_refused(
    request_of_two: JobRequest, started: list[str], tmp_path: Path
) -> None:
    arguments = arguments_of(request_of_two)
    file = runs_file(request_of_two)
    file.write_text(file.read_text().replace("aaaa0000", "cccc2222"))
    with pytest.raises(StoreError, match=f"{file}: is not the list of runs that was submitted"):
        start_rank.main(*arguments)
    file.unlink()
    with pytest.raises(StoreError, match=f"{file}: cannot be read: No such file"):
        start_rank.main(*arguments)
    assert started == []


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_start_rank_below_a_folder_that_others_may_write_to_is_refused(
    depth: int, request_of_two: JobRequest, started: list[str]
) -> None:
    arguments = arguments_of(request_of_two)
    (request_of_two.logs, *request_of_two.logs.parents)[depth].chmod(0o777)
    with pytest.raises(StoreError, match="may write to"):
        start_rank.main(*arguments)
    assert started == []


def test_start_of_a_folder_that_others_can_replace_reads_nothing(
    request_of_two: JobRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs of hpcft 0.1 call it straight from their pickle."""
    read: list[Any] = []
    monkeypatch.setattr(entry, "is_superseded", read.append)
    run = request_of_two.runs[0]
    run.parent.chmod(0o777)
    with pytest.raises(StoreError, match=f"{run}: every user may write to {run.parent}"):
        entry.start(str(run))
    assert read == []


def test_requeue_with_another_list_of_runs_is_refused(
    request_of_two: JobRequest, caplog: pytest.LogCaptureFixture
) -> None:
    _, file, digest = arguments_of(request_of_two)
    Path(file).write_text("[]")
    requeue.main(file, digest)
    assert f"not restarted: {file}: is not the list of runs that was submitted" in caplog.text


class Planted:
    """Creates a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


def test_the_command_of_a_rank_loads_no_pickle_of_the_logs(
    request_of_two: JobRequest, tmp_path: Path
) -> None:
    canary = tmp_path / "loaded"
    bomb = pickle.dumps(Planted(canary))
    for name in ("17_submitted.pkl", f"{request_of_two.token}.pkl", "17_0_result.pkl"):
        (request_of_two.logs / name).write_bytes(bomb)
    done = subprocess.run(
        rank_command(request_of_two, sys.executable), shell=True, text=True, check=False,
        capture_output=True, env=os.environ | LOCAL, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0, "the run folder is empty"
    assert not canary.exists()
    pickle.loads(bomb)
    assert canary.exists(), "the pickle works"
