"""Helpers for tests on the testbed: submitting runs, asking Slurm, disks that fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from builders import RECIPE, Cli, film_rows, write_rows
from hpcft.core.errors import HpcftError
from real_runs import folder_of, is_gone, until

NODES = ("n1", "n2", "n3", "n4")


@contextmanager
def campus(folder: Path) -> Iterator[Path]:
    """Makes a user's folder with a recipe of a tiny model the current folder."""
    rows = film_rows(12)
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "test.jsonl", rows[:8])
    (folder / "tiny.yaml").write_text(RECIPE)
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)


def slurm(*command: str) -> str:
    """Runs a scheduler command, which must not fail; returns its output."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


@contextmanager
def hpcft(*arguments: object, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Runs a command of hpcft in a process of its own; kills it at the end."""
    with subprocess.Popen(
        [sys.executable, "-m", "hpcft", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | environment,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def out_of(process: subprocess.Popen[str]) -> str:
    """Waits until a process ends; returns its output."""
    return process.communicate(timeout=120)[0]


def jobs(name: str) -> list[str]:
    """Returns the ids of all jobs of a recipe that Slurm knows, by array element."""
    lines = slurm("squeue", "-h", "-r", "-t", "all", "-o", "%i %j").splitlines()
    return [line.split()[0] for line in lines if line.split()[1] == name]


def live_jobs(name: str) -> list[str]:
    """Returns the ids of the jobs of a recipe that are queued or run."""
    lines = slurm("squeue", "-h", "-r", "-o", "%i %j").splitlines()
    return [line.split()[0] for line in lines if line.split()[1] == name]


def job_ids(name: str) -> list[str | None]:
    """Returns the latest job id in each run folder of a recipe."""
    files = sorted(Path("runs", name).absolute().glob("*/job.json"))
    return [json.loads(file.read_text())["attempts"][-1]["job_id"] for file in files]


def nothing_left(folder: Path) -> bool:
    """Waits until no process of a run is alive; returns True."""
    until(lambda: is_gone(folder), 20.0, "the end of all processes")
    return True


def submit(cli: Cli, name: str, *arguments: object, cluster: object = "testbed") -> Path:
    """Submits a run; returns its folder."""
    said = cli("submit", "tiny.yaml", "-c", cluster, "-o", f"name={name}", *arguments)
    assert said.code == 0, said.err
    return folder_of(name)


def view(cli: Cli, name: str) -> Any:
    """Returns the status of a recipe's only run, as JSON."""
    said = cli("status", name, "--json")
    assert said.code == 0, said.err
    return said.json[0]


@contextmanager
def closed(testbed: Any) -> Iterator[None]:
    """Drains all nodes, so that queued jobs stay queued."""
    for node in NODES:
        testbed.set_node(node, "drain", "a test")
    try:
        yield
    finally:
        until(lambda: set(testbed.node_states().values()) <= {"drained", "draining"}, 20.0)
        for node in NODES:
            testbed.set_node(node, "resume", "")


@contextmanager
def impatient(folder: Path) -> Iterator[None]:
    """Makes Slurm's clients give up a silent controller after seconds, not half a minute."""
    original = Path(os.environ["SLURM_CONF"])
    changed = folder / "impatient.conf"
    text = original.read_text().replace("MessageTimeout=30", "MessageTimeout=2")
    assert text != original.read_text()
    changed.write_text(text)
    shutil.copy(original.with_name("gres.conf"), folder)
    os.environ["SLURM_CONF"] = str(changed)
    try:
        yield
    finally:
        os.environ["SLURM_CONF"] = str(original)


@contextmanager
def small_disk(folder: Path, *, size: str, inodes: int) -> Iterator[Path]:
    """Mounts a file system for a few MiB and files.

    Raises:
        PermissionError: this machine does not allow mounting.
    """
    folder.mkdir()
    options = f"size={size},nr_inodes={inodes},mode=700"
    with _mounted("-t", "tmpfs", "-o", options, "none", folder):
        yield folder


@contextmanager
def freezable_disk(folder: Path) -> Iterator[Path]:
    """Mounts a file system of 64 MiB that `frozen` can freeze.

    Raises:
        PermissionError: this machine does not allow mounting.
    """
    missing = [name for name in ("mkfs.ext4", "fsfreeze") if shutil.which(name) is None]
    if missing:
        raise PermissionError(f"no {' and no '.join(missing)}")
    folder.mkdir()
    image = folder.with_suffix(".image")
    with image.open("wb") as file:
        file.truncate(64 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    with _mounted("-o", "loop,noatime", image, folder):
        folder.chmod(0o700)
        yield folder


@contextmanager
def frozen(disk: Path, max_s: float = 30.0) -> Iterator[None]:
    """Freezes a file system: writers wait and cannot be killed, readers continue.

    Raises:
        PermissionError: this machine does not allow it.
    """
    # It thaws by itself even if the test is killed: nothing could end the waiting processes.
    thaw = ["sh", "-c", f"sleep {max_s}; fsfreeze -u '{disk}'"]
    with subprocess.Popen(thaw, stderr=subprocess.DEVNULL, start_new_session=True) as later:
        try:
            freeze = ["fsfreeze", "-f", str(disk)]
            done = subprocess.run(freeze, capture_output=True, text=True, check=False)
            if done.returncode:
                raise PermissionError(done.stderr.strip())
            try:
                yield
            finally:
                subprocess.run(["fsfreeze", "-u", str(disk)], check=True)
        finally:
            os.killpg(later.pid, signal.SIGKILL)  # Also the `sleep` that it runs.


@contextmanager
def _mounted(*arguments: object) -> Iterator[None]:
    *_, folder = command = ["mount", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PermissionError(done.stderr.strip())
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def killed_at(delay_s: float, work: Callable[[], object]) -> bool:
    """Runs a function in a process that is killed after a while; returns whether it was."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            sink = os.open(os.devnull, os.O_WRONLY)
            for stream in (1, 2):
                os.dup2(sink, stream)
            work()
            code = 0
        except HpcftError:
            code = 2
        finally:
            os._exit(code)
    deadline = time.monotonic() + delay_s
    while time.monotonic() < deadline:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        time.sleep(0.0005)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return True
