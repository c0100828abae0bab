"""Starts, recognises and ends the processes of a testbed cluster."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from testbed_folder import TestbedError

INSTALL = (
    "apt-get install -y --no-install-recommends "
    "slurmctld slurmd slurm-client munge slurmdbd mariadb-server"
)
SLURM_PROGRAMS = ("munged", "slurmctld", "slurmd", "scontrol", "sinfo", "squeue", "scancel")
ACCOUNTING_PROGRAMS = ("mariadbd", "mariadb-install-db", "slurmdbd", "sacctmgr")

# Variables with which clients would use another cluster or print something else.
_CLIENT_PREFIXES = ("SLURM", "SBATCH", "SRUN", "SALLOC", "SQUEUE", "SINFO", "SACCT", "SCANCEL")

# Below the ports that Linux uses for outgoing connections (from 32768, ip_local_port_range).
_FIRST_PORT, _LAST_PORT = 20000, 32000

# Processes that this one started: unless it reaps them, they stay zombies.
_children: dict[int, subprocess.Popen[bytes]] = {}


class MissingProgramsError(TestbedError):
    """Error: programs that the cluster needs are not installed."""


@dataclass(frozen=True)
class Process:
    """A daemon; never mistaken for another process that gets its process id later."""

    program: str
    """Name of the program."""
    pid: int
    """Process id."""
    start_ticks: int
    """Start time in clock ticks: field 22 of /proc/PID/stat (proc(5))."""

    def alive(self) -> bool:
        """Returns whether the process still runs; a zombie does not."""
        if child := _children.get(self.pid):
            child.poll()
        stat = _stat(self.pid)
        if stat is None:
            return False
        # The kernel keeps 15 characters of a name.
        is_same = stat.program == self.program[:15] and stat.start_ticks == self.start_ticks
        return is_same and stat.state not in "ZX"

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal if the process still runs."""
        if self.alive():
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                return  # It has just ended.


class _Stat(NamedTuple):
    """Fields of /proc/PID/stat (proc(5))."""

    program: str
    state: str
    parent: int
    start_ticks: int


def _stat(pid: int) -> _Stat | None:
    """Reads the kernel's status of a process; returns None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace", encoding="utf-8")
    except OSError:
        return None
    name, _, rest = text.partition("(")[2].rpartition(")")
    values = rest.split()
    return _Stat(name, values[0], int(values[1]), int(values[19]))


def find_programs(names: Iterable[str]) -> dict[str, str]:
    """Finds the path of each program.

    Raises:
        MissingProgramsError: some are not installed; the message says how to install them.
    """
    # Daemons are in sbin folders, which a user's PATH lacks on Debian.
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin:/usr/sbin:/sbin"])
    paths = {name: shutil.which(name, path=path) for name in names}
    missing = [name for name, found in paths.items() if found is None]
    if missing:
        raise MissingProgramsError(f"not installed: {', '.join(missing)}; install with: {INSTALL}")
    return {name: found for name, found in paths.items() if found is not None}


def client_env(extra: Mapping[str, str]) -> dict[str, str]:
    """Returns this process's environment without Slurm's variables, plus `extra`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_CLIENT_PREFIXES)}
    return {**kept, **extra}


def spawn(argv: Sequence[str], env: Mapping[str, str], output: Path, cwd: Path) -> Process:
    """Starts a daemon that outlives this process; its output goes to a file."""
    with output.open("wb") as file:
        child = subprocess.Popen(
            argv,
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            umask=0o022,
        )
    _children[child.pid] = child
    stat = _stat(child.pid)
    return Process(Path(argv[0]).name, child.pid, stat.start_ticks if stat else 0)


def terminate(processes: Iterable[Process], timeout_s: float) -> None:
    """Ends processes and waits for them: SIGTERM first, SIGKILL after `timeout_s` seconds.

    Raises:
        TestbedError: a process still runs.
    """
    left = list(processes)
    for number, limit_s in ((signal.SIGTERM, timeout_s), (signal.SIGKILL, 5.0)):
        for process in left:
            process.signal(number)
        deadline = time.monotonic() + limit_s
        while (left := [p for p in left if p.alive()]) and time.monotonic() < deadline:
            time.sleep(0.02)
    if left:
        names = ", ".join(f"{p.program} (pid {p.pid})" for p in left)
        raise TestbedError(f"could not end {names}")


def call(argv: Sequence[str], env: Mapping[str, str], timeout_s: float = 20.0) -> str:
    """Runs a command; returns its output.

    Raises:
        TestbedError: it failed, or did not answer within `timeout_s` seconds.
    """
    name = Path(argv[0]).name
    try:
        done = subprocess.run(
            argv,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TestbedError(f"{name} did not answer within {timeout_s:g} s") from None
    if done.returncode:
        output = (done.stderr or done.stdout).strip()
        raise TestbedError(f"{name} {' '.join(argv[1:])} failed ({done.returncode}): {output}")
    return done.stdout


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Waits until a condition is true; returns False at the timeout."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def free_ports(count: int) -> int:
    """Returns the first of `count` consecutive ports on which no process listens.

    Raises:
        TestbedError: there are none.
    """
    # In random order, so that two clusters that start at once choose different ports.
    starts = list(range(_FIRST_PORT, _LAST_PORT - count, count))
    random.shuffle(starts)
    for first in starts:
        if all(_port_free(port) for port in range(first, first + count)):
            return first
    raise TestbedError(f"no {count} consecutive free ports from {_FIRST_PORT} to {_LAST_PORT}")


def _port_free(port: int) -> bool:
    """Returns whether a process can listen on a port, on every interface."""
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def listening(where: Path | int, greets: bool = False) -> bool:
    """Returns whether a daemon listens on a socket or a local port.

    Args:
        where: path of the socket, or the port.
        greets: whether the daemon must also send its greeting.
    """
    family = socket.AF_INET if isinstance(where, int) else socket.AF_UNIX
    address = ("127.0.0.1", where) if isinstance(where, int) else str(where)
    with socket.socket(family) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(address)
            return not greets or bool(probe.recv(1))
        except OSError:
            return False


def steps_of(slurm_conf: Path) -> list[Process]:
    """Returns the processes of a cluster's job steps: each slurmstepd and its descendants.

    They leave slurmd's process tree, so the record does not name them. A slurmstepd is recognised
    by the SLURM_CONF that it inherited.
    """
    stats = {int(p.name): _stat(int(p.name)) for p in Path("/proc").iterdir() if p.name.isdigit()}
    wanted = f"SLURM_CONF={slurm_conf}".encode()
    steps: dict[int, Process] = {}
    # A parent has the lower process id, unless the ids have wrapped around: hence two rounds.
    for _ in range(2):
        for pid, stat in sorted(stats.items()):
            if stat is None or pid in steps:
                continue
            if stat.parent in steps or (stat.program == "slurmstepd" and wanted in _environ(pid)):
                steps[pid] = Process(stat.program, pid, stat.start_ticks)
    return list(steps.values())


def _environ(pid: int) -> list[bytes]:
    """Returns a process's environment; empty if it may not be read."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []
