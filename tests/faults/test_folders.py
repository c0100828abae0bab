"""Tests of runs whose folder is removed, full, frozen, read-only, or late."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from on_slurm import (
    campus,
    closed,
    freezable_disk,
    frozen,
    hpcft,
    jobs,
    live_jobs,
    nothing_left,
    small_disk,
    submit,
    view,
)

from builders import Cli
from hpcft.jobs import status
from hpcft.scheduler import slurm_commands
from real_runs import current_step, find_processes, losses, until, worker_pids

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def place(testbed: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's folder for all tests of this module."""
    with campus(tmp_path_factory.mktemp("folders")) as folder:
        yield folder
        subprocess.run(["scancel", "--user=root", "--quiet"], check=False)


@pytest.mark.slow
def test_status_waits_for_a_result_that_comes_late(
    place: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = submit(cli, "late")
    (job_id,) = jobs("late")
    result, held_back = folder / "result.json", folder / "held-back"
    until(result.exists)
    result.rename(held_back)
    until(lambda: slurm_commands.job_states([job_id])[job_id].state == "COMPLETED", 30)
    seen = view(cli, "late")
    assert (seen["state"], seen["note"]) == (
        "RUNNING", "its job has ended; the result is not visible here yet",
    )  # fmt: skip
    assert "is already queued or running" in cli("submit", "tiny.yaml", "-o", "name=late").err
    monkeypatch.setattr(status, "RESULT_GRACE_S", 0.0)
    assert view(cli, "late")["state"] == "FAILED"
    held_back.rename(result)
    assert view(cli, "late")["state"] == "COMPLETED"


@pytest.mark.slow
def test_the_job_of_a_removed_run_folder_ends(place: Path, cli: Cli, testbed: Any) -> None:
    """The job ends by itself, whether it was running or pending."""
    running = submit(cli, "removed", "-o", "train.max_steps=300")
    until(lambda: current_step(running) > 0)
    (first,) = jobs("removed")
    with hpcft("status", "removed", "--watch") as watching:
        with closed(testbed):
            pending = submit(cli, "unstarted")
            shutil.rmtree(pending)
            assert cli("status", "unstarted").code == 2
        assert watching.stderr
        watching.stderr.readline()
        shutil.rmtree(running)
        assert "its folder is gone" in watching.communicate(timeout=60)[1]
    assert watching.returncode == 1
    for name in ("removed", "unstarted"):
        until(lambda name=name: not live_jobs(name), 90, name)
    for folder in (running, pending):
        assert not worker_pids(folder)
        assert not find_processes("hpcft.training.start_rank", folder / "logs")
    assert jobs("removed") == [first]
    assert len(jobs("unstarted")) == 1


@pytest.mark.slow
def test_a_run_on_a_full_disk_fails_as_disk(place: Path, cli: Cli, tmp_path: Path) -> None:
    try:
        with small_disk(tmp_path / "d", size="40m", inodes=2000) as disk:
            common = ("--runs-dir", disk)
            said = cli("submit", "tiny.yaml", "-c", "testbed", "-o", "name=filled", *common,
                       "-o", "train.max_steps=300")  # fmt: skip
            assert said.code == 0, said.err
            (folder,) = disk.glob("filled/*")
            until(lambda: current_step(folder) > 0)
            subprocess.run(["sh", "-c", f"cat /dev/zero > {disk}/other"], check=False,
                           stderr=subprocess.DEVNULL)  # fmt: skip
            until(lambda: not live_jobs("filled"), 120, "the end of the job")
            seen = cli("status", "filled", "--json", *common).json[0]
            assert (seen["state"], seen["failure"]["class"]) == ("FAILED", "disk"), seen
            assert len(jobs("filled")) == 1
            assert nothing_left(folder)
    except PermissionError as refused:
        pytest.skip(f"no file system can be mounted here: {refused}")


@pytest.mark.slow
def test_a_run_waits_for_a_frozen_file_system(place: Path, cli: Cli, tmp_path: Path) -> None:
    """Nothing fails or is done twice, and `hpcft status` still works."""
    try:
        with freezable_disk(tmp_path / "d") as disk:
            common = ("--runs-dir", disk)
            said = cli("submit", "tiny.yaml", "-c", "testbed", "-o", "name=slow", *common,
                       "-o", "train.max_steps=300", "-o", "train.logging_steps=10")  # fmt: skip
            assert said.code == 0, said.err
            (folder,) = disk.glob("slow/*")
            until(lambda: current_step(folder) > 0)
            for seconds in (3, 8):
                with frozen(disk):
                    started, reached = time.monotonic(), current_step(folder)
                    while time.monotonic() - started < seconds:
                        seen = cli("status", "slow", "--json", *common).json[0]
                        assert seen["state"] == "RUNNING", seen
                        time.sleep(1)
                    assert current_step(folder) == reached
                until(lambda reached=reached: current_step(folder) > reached, 30, "the next step")
            assert cli("status", "slow", "--watch", *common).code == 0
            seen = cli("status", "slow", "--json", *common).json[0]
            assert (seen["state"], seen["recoveries"]) == ("COMPLETED", []), seen
            assert len(losses(folder)) == 30
            assert len(jobs("slow")) == 1
            assert nothing_left(folder)
    except PermissionError as refused:
        pytest.skip(f"no file system can be mounted or stopped here: {refused}")


def set_immutable(folder: Path, *, immutable: bool) -> None:
    """Makes a folder and those in it immutable, even for root, or mutable again.

    Raises:
        PermissionError: this machine does not allow it.
    """
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    command = ["chattr", "+i" if immutable else "-i", *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and immutable:
        raise PermissionError(done.stderr.strip())


@pytest.mark.slow
def test_a_run_in_a_read_only_folder_fails_and_can_be_resumed(place: Path, cli: Cli) -> None:
    """The run ends at the first checkpoint that it cannot write."""
    folder = submit(cli, "locked", "-o", "train.max_steps=400",
                    "-o", "train.save_strategy=steps", "-o", "train.save_steps=100")  # fmt: skip
    until(lambda: current_step(folder) > 0)
    try:
        set_immutable(folder, immutable=True)
    except PermissionError as refused:
        pytest.skip(f"no folder can be made read-only for root here: {refused}")
    try:
        until(lambda: view(cli, "locked")["state"] == "FAILED", 120, "the end of the job")
        seen = view(cli, "locked")
        assert re.search(r"rank 0 on n\d: .*/checkpoint-\d00", seen["note"])
        assert len(jobs("locked")) == 1
        assert nothing_left(folder)
    finally:
        set_immutable(folder, immutable=False)
    assert cli("resume", "locked", "--watch").code == 0
    assert view(cli, "locked")["state"] == "COMPLETED"
