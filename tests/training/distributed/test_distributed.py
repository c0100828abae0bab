"""A start leans on what is shared with others: build locks, ports, a folder that may be full."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpcft.core import attempts
from hpcft.core.errors import DataError
from hpcft.core.files import read_record, write_record
from hpcft.core.paths import RunPaths
from hpcft.core.records import Progress
from hpcft.recovery.diagnosis import RankError, classify
from hpcft.training.distributed import rendezvous, torch_extensions
from hpcft.training.distributed.rank_env import RankInfo
from hpcft.training.distributed.torch_extensions import OperatorLock, extensions_folder
from hpcft.training.telemetry.progress import ProgressReporter

# ---------------------------------------------------------------- locks of operators

HOLDS = """
import sys, time
from hpcft.training.distributed.torch_extensions import OperatorLock
OperatorLock(sys.argv[1]).try_acquire()
print("has it", flush=True)
time.sleep(600)
"""

LOADS = """
import os
from hpcft.training.distributed import torch_extensions
os.environ.update(DS_ACCELERATOR="cpu", TORCH_EXTENSIONS_DIR=str(torch_extensions.extensions_folder()))
torch_extensions.use_own_lock()
torch_extensions.build_named(["ShareMemCommBuilder"])
"""


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of a build."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, tmp_path / "lock"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "has it\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_living_owner_is_waited_for_and_then_named(
    tmp_path: Path, owner: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_extensions, "MOST_WAIT_S", 0.3)
    with pytest.raises(DataError) as raised:
        OperatorLock(str(tmp_path / "lock")).try_acquire()
    assert str(raised.value).startswith(f"{tmp_path}/hpcft.lock: the build lock of a DeepSpeed ")
    assert f"held by process {owner.pid} on {os.uname().nodename} after 0 s" in str(raised.value)
    told = RankError(rank=0, node="n", at=0.0, kind="DataError", message=str(raised.value))
    failure = classify(told)
    assert failure is not None
    assert failure.name == "stale_build_lock"


def test_a_dead_owner_holds_nobody_up(tmp_path: Path, owner: subprocess.Popen[str]) -> None:
    """Neither one of ours nor one that left the file torch waits for."""
    (tmp_path / "lock").touch()
    owner.kill()
    owner.wait()
    begun = time.monotonic()
    first = OperatorLock(str(tmp_path / "lock"))
    assert first.try_acquire()
    first.release()
    assert OperatorLock(str(tmp_path / "lock")).try_acquire(), "it was given back"
    assert time.monotonic() - begun < 1


@pytest.mark.slow
def test_a_stale_lock_does_not_keep_an_operator_from_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of DeepSpeed itself, in a copy of what is built: torch would wait for ever."""
    built = extensions_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if built.is_dir():  # else it is built here, which takes longer
        shutil.copytree(built, extensions_folder())
    operator = extensions_folder() / "deepspeed_shm_comm"
    operator.mkdir(parents=True, exist_ok=True)
    (operator / "lock").touch()
    subprocess.run([sys.executable, "-c", LOADS], check=True, capture_output=True, timeout=120)
    assert (operator / "deepspeed_shm_comm.so").exists()


# ---------------------------------------------------------------- ports


def test_the_port_is_held_until_the_ranks_have_met(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import distributed

    port = rendezvous._hold_port()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", port))
    assert rendezvous._hold_port() != port
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0",
                        "WORLD_SIZE": "1"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    distributed.init_process_group("gloo")
    try:
        assert distributed.get_world_size() == 1
    finally:
        distributed.destroy_process_group()


# ---------------------------------------------------------------- the heartbeat


@pytest.fixture
def heartbeat(tmp_path: Path) -> ProgressReporter:
    folder = tmp_path / "run"
    folder.mkdir()
    return ProgressReporter(RunPaths(folder), RankInfo(0, 1, 0, "here", "1"))


def test_seconds_of_all_starts_add_up_and_those_between_do_not(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    first = Progress(phase="training", started_at=1000.0, updated_at=1600.0, ranks=2)
    write_record(paths.progress, first)
    second = ProgressReporter(paths, RankInfo(0, 4, 0, "here", "2"), generation=1).progress
    second = second.model_copy(update={"updated_at": second.started_at + 30})
    assert second.ran_s() == pytest.approx((630, 2 * 600 + 4 * 30))
    write_record(paths.progress, second)
    attempts.archive(paths, [paths.progress])  # as a job does that queues another one
    third = ProgressReporter(paths, RankInfo(0, 1, 0, "here", "3"), generation=2).progress
    assert third.previous_s == pytest.approx(630)
    assert ProgressReporter(paths, RankInfo(0, 1, 0, "here", "4")).progress.previous_s == 0, (
        "a run anew"
    )


def lines(heartbeat: ProgressReporter) -> list[Any]:
    text = heartbeat.paths.metrics.read_text()
    return [json.loads(line)["loss"] for line in text.splitlines()]


def test_a_folder_that_goes_away_for_a_while_ends_no_training(
    heartbeat: ProgressReporter, caplog: pytest.LogCaptureFixture
) -> None:
    heartbeat.log("step", {"loss": 1})
    folder = heartbeat.paths.folder
    folder.rename(folder.with_name("away"))
    heartbeat.set(phase="model")
    heartbeat.log("step", {"loss": 2})
    heartbeat.set(phase="training", step=1)
    heartbeat.log("step", {"loss": 3})
    assert [record.levelname for record in caplog.records] == ["WARNING"], "it is told once"
    assert "No such file or directory" in caplog.text
    folder.with_name("away").rename(folder)
    heartbeat.set(phase="evaluation")
    assert lines(heartbeat) == [1, 2, 3]
    assert read_record(heartbeat.paths.progress, Progress).phase == "evaluation"


def test_a_full_disk_leaves_no_part_of_a_line(heartbeat: ProgressReporter) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = 4000  # bytes that a file may have; the heartbeat itself takes less
    written = 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (full, before[1]))
    try:
        while heartbeat.paths.metrics.stat().st_size < full - 500 if written else True:
            heartbeat.log("step", {"loss": written})
            written += 1
        for _ in range(20):
            heartbeat.log("step", {"loss": written})
            written += 1
        assert len(lines(heartbeat)) < written
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    heartbeat.set(phase="training")
    assert lines(heartbeat) == list(range(written))
