"""The testbed as a real cluster: nodes, GPUs, accounts, and jobs that outlive the controller."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from testbed import Testbed

pytestmark = pytest.mark.slurm

SCRIPT = Path(__file__).parents[1] / "slurm" / "testbed" / "testbed.py"


def run(*argv: str, timeout_s: float = 30.0) -> subprocess.CompletedProcess[str]:
    """Runs a command, which may fail."""
    return subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s, check=False)


def out(*argv: str, timeout_s: float = 30.0) -> list[str]:
    """Returns the lines that a command prints; it must not fail."""
    done = run(*argv, timeout_s=timeout_s)
    assert done.returncode == 0, f"{argv}: {done.stderr}"
    return done.stdout.splitlines()


def submit(folder: Path, command: str, *options: str) -> str:
    """Submits a batch job; returns its id."""
    output = ("-o", str(folder / "job-%j.out"))
    return out("sbatch", "--parsable", *output, *options, "--wrap", command)[0]


def wait_for(read: Callable[[], str], expected: str, timeout_s: float = 20.0) -> None:
    """Reads a value until it is the expected one."""
    deadline = time.monotonic() + timeout_s
    while (got := read()) != expected:
        assert time.monotonic() < deadline, f"expected {expected!r}, still {got!r}"
        time.sleep(0.1)


def field(job_id: str, name: str) -> str:
    """Returns a field of `scontrol show job`."""
    words = " ".join(out("scontrol", "show", "job", "-o", job_id)).split()
    return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder with a short path, because the names of sockets are limited."""
    folder = Path(tempfile.mkdtemp(prefix="hpcft-"))
    yield folder
    shutil.rmtree(folder)


def test_sinfo_shows_the_requested_nodes_and_gpus(testbed: Testbed) -> None:
    testbed.wait_idle()
    rows = out("sinfo", "-hN", "-p", "main", "-o", "%N %T %G %m")
    assert rows == [f"n{i} idle gpu:4 12000" for i in (1, 2, 3, 4)]


def test_srun_on_two_nodes_runs_tasks_on_both(testbed: Testbed) -> None:
    """All nodes are one machine: only SLURMD_NODENAME distinguishes them."""
    names = out("srun", "-N2", "--ntasks-per-node=2", "printenv", "SLURMD_NODENAME")
    assert len(names) == 4
    assert {names.count(name) for name in set(names)} == {2}


def test_srun_gets_the_requested_gpus_and_no_more_than_a_node_has(testbed: Testbed) -> None:
    devices = out("srun", "-N1", "--gpus-per-node=2", "printenv", "CUDA_VISIBLE_DEVICES")
    assert devices == ["0,1"]
    refused = run("srun", "-N1", "--gpus-per-node=5", "true")
    assert refused.returncode != 0
    assert "Requested node configuration is not available" in refused.stderr


@pytest.mark.parametrize(
    ("command", "expected"), [("true", "COMPLETED|0:0|lab"), ("exit 4", "FAILED|4:0|lab")]
)
def test_sacct_shows_state_exit_code_and_account(
    testbed: Testbed, tmp_path: Path, command: str, expected: str
) -> None:
    job_id = submit(tmp_path, command)
    query = ("sacct", "-XnP", "-j", job_id, "-o", "State,ExitCode,Account")
    wait_for(lambda: "".join(out(*query)), expected)


def test_sbatch_accepts_the_default_account(testbed: Testbed) -> None:
    for options in ([], ["--account=lab"]):
        out("sbatch", "--test-only", *options, "--wrap", "true")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--account=nosuch", "Invalid account"),
        ("--partition=nosuch", "Invalid partition"),
    ],
)
def test_sbatch_refuses_another_account_or_partition(
    testbed: Testbed, option: str, words: str
) -> None:
    """Slurm says so before anything is queued."""
    refused = run("sbatch", "--test-only", option, "--wrap", "true")
    assert refused.returncode != 0
    assert words in refused.stderr


def test_job_completes_although_the_controller_restarts(testbed: Testbed, tmp_path: Path) -> None:
    done = tmp_path / "done"
    job_id = submit(tmp_path, f"until [ -e {done} ]; do sleep 0.1; done")
    wait_for(lambda: field(job_id, "JobState"), "RUNNING")
    testbed.stop_controller()
    try:
        assert "slurmctld" not in [name for name, alive in testbed.daemons().items() if alive]
    finally:
        testbed.start_controller()
    assert (field(job_id, "JobState"), field(job_id, "Restarts")) == ("RUNNING", "0")
    done.touch()
    wait_for(lambda: field(job_id, "JobState"), "COMPLETED")


def test_sacct_fails_only_while_accounting_is_stopped(testbed: Testbed) -> None:
    testbed.stop_accounting()
    try:
        assert run("sacct", "-X").returncode != 0
        out("squeue")
    finally:
        testbed.start_accounting()
    out("sacct", "-X")


def test_set_node_down_is_shown_with_its_reason(testbed: Testbed) -> None:
    testbed.set_node("n4", "down", reason="fuse")
    try:
        assert out("sinfo", "-hN", "-n", "n4", "-p", "main", "-o", "%t %E") == ["down fuse"]
    finally:
        testbed.set_node("n4", "resume")
    testbed.wait_idle()


def test_second_cluster_in_another_folder_leaves_the_first_alone(
    testbed: Testbed, short_folder: Path
) -> None:
    before = testbed.daemons()
    with type(testbed)(short_folder, nodes=1, gpus=1, accounting=False) as second:
        assert second.env != testbed.env
        assert second.node_states() == {"n1": "idle"}
        assert len(testbed.node_states()) == 4
        env = {**os.environ, **second.env}
        srun = ["srun", "--gpus-per-node=1", "printenv", "CUDA_VISIBLE_DEVICES"]
        assert subprocess.check_output(srun, env=env, text=True, timeout=30) == "0\n"
    assert not second.running
    assert testbed.daemons() == before


def test_start_on_a_running_cluster_only_prints_how_to_use_it(testbed: Testbed) -> None:
    """Its standard output holds shell lines and nothing else."""
    folder = str(testbed.layout.root)
    before = testbed.layout.record.read_text()
    assert out(sys.executable, str(SCRIPT), "start", "--dir", folder, "--nodes", "1") == [
        f"export SLURM_CONF={testbed.env['SLURM_CONF']}"
    ]
    assert testbed.layout.record.read_text() == before
    status = out(sys.executable, str(SCRIPT), "status", "--dir", folder)
    assert "slurmctld\trunning" in status


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--nodes", "0"], "expected a number from 1 to 200, got 0"),
        (["--dir", "/tmp/" + "x" * 90], "choose a shorter one"),
        (["--dir", "/tmp/a b"], "letters, digits"),
    ],
)
def test_start_with_a_wrong_option_prints_one_line(options: list[str], words: str) -> None:
    refused = run(sys.executable, str(SCRIPT), "start", *options)
    assert refused.returncode == 2
    assert words in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
