"""The testbed is a real cluster: nodes, GPUs, accounts, and jobs that outlive their controller."""

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
    """What a command answered, whether well or not."""
    return subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s, check=False)


def out(*argv: str, timeout_s: float = 30.0) -> list[str]:
    """The lines that a command printed; it must not fail."""
    done = run(*argv, timeout_s=timeout_s)
    assert done.returncode == 0, f"{argv}: {done.stderr}"
    return done.stdout.splitlines()


def submit(folder: Path, command: str, *options: str) -> str:
    """The id of a new batch job."""
    output = ("-o", str(folder / "job-%j.out"))
    return out("sbatch", "--parsable", *output, *options, "--wrap", command)[0]


def eventually(what: Callable[[], str], expected: str, timeout_s: float = 20.0) -> None:
    """Asks until the answer is as expected."""
    deadline = time.monotonic() + timeout_s
    while (got := what()) != expected:
        assert time.monotonic() < deadline, f"expected {expected!r}, still {got!r}"
        time.sleep(0.1)


def field(job_id: str, name: str) -> str:
    """A field of `scontrol show job`."""
    words = " ".join(out("scontrol", "show", "job", "-o", job_id)).split()
    return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose path leaves room for the names of sockets, as pytest's may not."""
    folder = Path(tempfile.mkdtemp(prefix="hpcft-"))
    yield folder
    shutil.rmtree(folder)


def test_four_idle_nodes_with_four_gpus_each(testbed: Testbed) -> None:
    """What sinfo shows is what was asked for."""
    testbed.wait_idle()
    rows = out("sinfo", "-hN", "-p", "main", "-o", "%N %T %G %m")
    assert rows == [f"n{i} idle gpu:4 12000" for i in (1, 2, 3, 4)]


def test_tasks_run_on_two_nodes(testbed: Testbed) -> None:
    """Two tasks on each of two nodes, told apart by SLURMD_NODENAME."""
    names = out("srun", "-N2", "--ntasks-per-node=2", "printenv", "SLURMD_NODENAME")
    assert len(names) == 4
    assert {names.count(name) for name in set(names)} == {2}


def test_gpus_are_given_out_and_limited(testbed: Testbed) -> None:
    """A job sees the devices it asked for, and cannot ask for more than a node has."""
    devices = out("srun", "-N1", "--gpus-per-node=2", "printenv", "CUDA_VISIBLE_DEVICES")
    assert devices == ["0,1"]
    refused = run("srun", "-N1", "--gpus-per-node=5", "true")
    assert refused.returncode != 0
    assert "Requested node configuration is not available" in refused.stderr


@pytest.mark.parametrize(
    ("command", "expected"), [("true", "COMPLETED|0:0|lab"), ("exit 4", "FAILED|4:0|lab")]
)
def test_sacct_tells_state_and_exit_code(
    testbed: Testbed, tmp_path: Path, command: str, expected: str
) -> None:
    """Accounting knows how a job ended, and that it ran under the default account."""
    job_id = submit(tmp_path, command)
    query = ("sacct", "-XnP", "-j", job_id, "-o", "State,ExitCode,Account")
    eventually(lambda: "".join(out(*query)), expected)


def test_good_accounts_are_taken(testbed: Testbed) -> None:
    """With the account and without one, a job may be submitted."""
    for options in ([], ["--account=lab"]):
        out("sbatch", "--test-only", *options, "--wrap", "true")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--account=nosuch", "Invalid account"),
        ("--partition=nosuch", "Invalid partition"),
    ],
)
def test_bad_account_or_partition_is_refused(testbed: Testbed, option: str, words: str) -> None:
    """Slurm says so before anything is queued."""
    refused = run("sbatch", "--test-only", option, "--wrap", "true")
    assert refused.returncode != 0
    assert words in refused.stderr


def test_job_outlives_its_controller(testbed: Testbed, tmp_path: Path) -> None:
    """While slurmctld is away a job runs on; afterwards it is known again and ends well."""
    done = tmp_path / "done"
    job_id = submit(tmp_path, f"until [ -e {done} ]; do sleep 0.1; done")
    eventually(lambda: field(job_id, "JobState"), "RUNNING")
    testbed.stop_controller()
    try:
        assert "slurmctld" not in [name for name, alive in testbed.daemons().items() if alive]
    finally:
        testbed.start_controller()
    assert (field(job_id, "JobState"), field(job_id, "Restarts")) == ("RUNNING", "0")
    done.touch()
    eventually(lambda: field(job_id, "JobState"), "COMPLETED")


def test_accounting_can_go_and_come_back(testbed: Testbed) -> None:
    """Without slurmdbd sacct fails and the queue answers; then both answer."""
    testbed.stop_accounting()
    try:
        assert run("sacct", "-X").returncode != 0
        out("squeue")
    finally:
        testbed.start_accounting()
    out("sacct", "-X")


def test_node_goes_down_and_comes_back(testbed: Testbed) -> None:
    """A node set down is down at once, with its reason."""
    testbed.set_node("n4", "down", reason="fuse")
    try:
        assert out("sinfo", "-hN", "-n", "n4", "-p", "main", "-o", "%t %E") == ["down fuse"]
    finally:
        testbed.set_node("n4", "resume")
    testbed.wait_idle()


def test_second_cluster_beside_the_first(testbed: Testbed, short_folder: Path) -> None:
    """Another folder is another cluster; the first does not notice it."""
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


def test_starting_again_only_says_how_to_use_it(testbed: Testbed) -> None:
    """`start` on a running cluster changes nothing; stdout holds shell lines and nothing else."""
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
def test_mistakes_get_a_sentence(options: list[str], words: str) -> None:
    """A wrong option ends with exit code 2 and one line, not a traceback."""
    refused = run(sys.executable, str(SCRIPT), "start", *options)
    assert refused.returncode == 2
    assert words in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
