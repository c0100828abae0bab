"""Work on several cores: all values in order, and no process left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from hpcft.jobs import parallel

WORK = """
import os, sys, time
from hpcft.jobs import parallel

def work(item):
    if item < 0:
        os.kill(os.getpid(), 9)
    if item >= 100:
        os.write(1, b"started\\n")
        time.sleep(60)
    return item * item, os.getpid()

found = list(parallel.parallel_map(work, [int(item) for item in sys.argv[1:]]))
print([square for square, _ in found], os.getpid() in {pid for _, pid in found})
"""
several = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")


def start(folder: Path, *items: int) -> subprocess.Popen[str]:
    """Starts another process that does the work: this one has loaded PyTorch."""
    script = folder / "work.py"
    script.write_text(WORK)
    return subprocess.Popen(
        [sys.executable, script, *map(str, items)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # Tests in the background of a shell ignore Ctrl-C, and their children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


@pytest.mark.parametrize("count", [3, pytest.param(9, marks=several)])
def test_parallel_map_returns_all_values_in_order(tmp_path: Path, count: int) -> None:
    out, err = start(tmp_path, *range(count)).communicate(timeout=60)
    assert err == ""
    assert out.strip() == f"{[item**2 for item in range(count)]} {count < 4}"


def test_parallel_map_with_pytorch_loaded_starts_no_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch", pytest)
    assert set(parallel.parallel_map(lambda _: os.getpid(), range(9))) == {os.getpid()}


@several
def test_parallel_map_ends_its_processes_after_ctrl_c(tmp_path: Path) -> None:
    running = start(tmp_path, 100, 101, 102, 103)
    assert running.stdout is not None
    assert running.stdout.readline() == "started\n"
    workers = psutil.Process(running.pid).children(recursive=True)
    assert workers
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=20)
    assert err.strip().endswith("KeyboardInterrupt"), "the parent process raises it"
    assert not [worker for worker in workers if worker.is_running()]


@several
def test_parallel_map_with_a_killed_process_raises(tmp_path: Path) -> None:
    _, err = start(tmp_path, -1, 1, 2, 3).communicate(timeout=60)
    assert "HpcftError: a planning process was killed" in err
