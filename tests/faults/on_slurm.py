"""Runs on the real testbed as these tests see them: submitted, asked about, and left clean."""

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
    """A user's folder with a recipe of a tiny model; it is the current one."""
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
    """What a scheduler command prints; it must not fail."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


@contextmanager
def hpcft(*arguments: object, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The command as a user types it, in a process of its own, which runs until then."""
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
    """What a process prints until it ends."""
    return process.communicate(timeout=120)[0]


def jobs(name: str) -> list[str]:
    """Ids of all jobs of a recipe that Slurm knows, ended or not; of arrays those of elements."""
    lines = slurm("squeue", "-h", "-r", "-t", "all", "-o", "%i %j").splitlines()
    return [line.split()[0] for line in lines if line.split()[1] == name]


def live_jobs(name: str) -> list[str]:
    """Those of them that are queued or run."""
    lines = slurm("squeue", "-h", "-r", "-o", "%i %j").splitlines()
    return [line.split()[0] for line in lines if line.split()[1] == name]


def job_ids(name: str) -> list[str | None]:
    """The job id that each run of a recipe has noted last, by run folder."""
    files = sorted(Path("runs", name).absolute().glob("*/job.json"))
    return [json.loads(file.read_text())["attempts"][-1]["job_id"] for file in files]


def nothing_left(folder: Path) -> bool:
    """Whether no process of a run is alive, waiting a moment for those that are ending."""
    until(lambda: is_gone(folder), 20.0, "the end of all processes")
    return True


def submit(cli: Cli, name: str, *arguments: object, cluster: object = "testbed") -> Path:
    """The folder of a new run."""
    said = cli("submit", "tiny.yaml", "-c", cluster, "-o", f"name={name}", *arguments)
    assert said.code == 0, said.err
    return folder_of(name)


def view(cli: Cli, name: str) -> Any:
    said = cli("status", name, "--json")
    assert said.code == 0, said.err
    return said.json[0]


@contextmanager
def closed(testbed: Any) -> Iterator[None]:
    """No job starts: what is queued stays so."""
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
    """Clients that give up a silent controller after seconds, not after half a minute."""
    whole = Path(os.environ["SLURM_CONF"])
    own = folder / "impatient.conf"
    text = whole.read_text().replace("MessageTimeout=30", "MessageTimeout=2")
    assert text != whole.read_text()
    own.write_text(text)
    shutil.copy(whole.with_name("gres.conf"), folder)
    os.environ["SLURM_CONF"] = str(own)
    try:
        yield
    finally:
        os.environ["SLURM_CONF"] = str(whole)


@contextmanager
def small_disk(folder: Path, *, size: str, inodes: int) -> Iterator[Path]:
    """A file system of a few MiB and files, mounted on a folder.

    Raises:
        PermissionError: this machine does not let us mount.
    """
    folder.mkdir()
    options = f"size={size},nr_inodes={inodes},mode=700"
    with _mounted("-t", "tmpfs", "-o", options, "none", folder):
        yield folder


@contextmanager
def disk_that_can_stand_still(folder: Path) -> Iterator[Path]:
    """A file system of 64 MiB that `standing_still` can stop, mounted on a folder.

    Raises:
        PermissionError: this machine does not let us mount.
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
def standing_still(disk: Path, most_s: float = 30.0) -> Iterator[None]:
    """Whoever writes to the file system waits, and cannot be killed; readers go on.

    Raises:
        PermissionError: this machine does not let us.
    """
    # It goes on by itself, whatever becomes of the test: nothing could end what waits for it.
    again = ["sh", "-c", f"sleep {most_s}; fsfreeze -u '{disk}'"]
    with subprocess.Popen(again, stderr=subprocess.DEVNULL, start_new_session=True) as later:
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
            os.killpg(later.pid, signal.SIGKILL)  # its sleep too


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
    """Does some work in a process of its own that is killed after a while; whether it was."""
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
