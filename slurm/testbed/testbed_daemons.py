"""Processes of a testbed cluster: find, start, recognise, stop, and ask with a time limit."""

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

# Variables that would point clients elsewhere or change what they print.
_CLIENT_PREFIXES = ("SLURM", "SBATCH", "SRUN", "SALLOC", "SQUEUE", "SINFO", "SACCT", "SCANCEL")

# Below the ports that Linux hands to outgoing connections (32768 on, ip_local_port_range).
_FIRST_PORT, _LAST_PORT = 20000, 32000

# Started by this process: kept so that they can be reaped, or they would stay zombies.
_children: dict[int, subprocess.Popen[bytes]] = {}


class MissingProgramsError(TestbedError):
    """Programs that the cluster needs are not installed."""


@dataclass(frozen=True)
class Process:
    """A daemon that was started, recognisable even after its pid went to another process."""

    program: str
    pid: int
    start_ticks: int
    """Field 22 of /proc/PID/stat (proc(5)): when it started."""

    def alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        if child := _children.get(self.pid):
            child.poll()
        seen = _stat(self.pid)
        if seen is None:
            return False
        # The kernel keeps 15 characters of a name.
        same = seen.program == self.program[:15] and seen.start_ticks == self.start_ticks
        return same and seen.state not in "ZX"

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal, if it still runs."""
        if self.alive():
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                return  # ended just now


class _Stat(NamedTuple):
    """Fields of /proc/PID/stat (proc(5))."""

    program: str
    state: str
    parent: int
    start_ticks: int


def _stat(pid: int) -> _Stat | None:
    """What the kernel says of a process, or None when there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    name, _, rest = text.partition("(")[2].rpartition(")")
    values = rest.split()
    return _Stat(name, values[0], int(values[1]), int(values[19]))


def find_programs(names: Iterable[str]) -> dict[str, str]:
    """The path of each program.

    Raises:
        MissingProgramsError: some are not installed; the message says how to install them.
    """
    # Daemons live in sbin folders, which an ordinary user's PATH lacks on Debian.
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin:/usr/sbin:/sbin"])
    found = {name: shutil.which(name, path=path) for name in names}
    missing = [name for name, where in found.items() if where is None]
    if missing:
        raise MissingProgramsError(f"not installed: {', '.join(missing)}; install with: {INSTALL}")
    return {name: where for name, where in found.items() if where is not None}


def client_env(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without what would mislead Slurm's programs, plus `extra`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_CLIENT_PREFIXES)}
    return {**kept, **extra}


def spawn(argv: Sequence[str], env: Mapping[str, str], output: Path, cwd: Path) -> Process:
    """Starts a daemon that outlives this process; what it prints goes to `output`."""
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
    seen = _stat(child.pid)
    return Process(Path(argv[0]).name, child.pid, seen.start_ticks if seen else 0)


def terminate(processes: Iterable[Process], timeout_s: float) -> None:
    """Ends processes and waits for them: TERM first, KILL after `timeout_s`."""
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
    """What a command prints.

    Raises:
        TestbedError: it failed, or did not answer within `timeout_s`.
    """
    name = Path(argv[0]).name
    try:
        done = subprocess.run(
            argv,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TestbedError(f"{name} did not answer within {timeout_s:g} s") from None
    if done.returncode:
        words = (done.stderr or done.stdout).strip()
        raise TestbedError(f"{name} {' '.join(argv[1:])} failed ({done.returncode}): {words}")
    return done.stdout


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Whether a condition came true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def free_ports(count: int) -> int:
    """The first of `count` consecutive ports that nobody listens on."""
    # A random place, so that two clusters started at once do not choose the same.
    places = list(range(_FIRST_PORT, _LAST_PORT - count, count))
    random.shuffle(places)
    for first in places:
        if all(_port_free(port) for port in range(first, first + count)):
            return first
    raise TestbedError(f"no {count} consecutive free ports from {_FIRST_PORT} to {_LAST_PORT}")


def _port_free(port: int) -> bool:
    """Whether one can listen on a port, on every interface."""
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def listening(where: Path | int, greets: bool = False) -> bool:
    """Whether a daemon listens on a socket or a local port, and if it should, greets."""
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
    """The job steps of one cluster that still run: their supervisors and all below these.

    They leave slurmd's process tree, so that no record of ours can name them; a supervisor
    (slurmstepd) is known by the SLURM_CONF that it inherited.
    """
    seen = {int(p.name): _stat(int(p.name)) for p in Path("/proc").iterdir() if p.name.isdigit()}
    wanted = f"SLURM_CONF={slurm_conf}".encode()
    found: dict[int, Process] = {}
    # A parent before its children, except where pids wrapped round: so twice.
    for _ in range(2):
        for pid, stat in sorted(seen.items()):
            if stat is None or pid in found:
                continue
            if stat.parent in found or (stat.program == "slurmstepd" and wanted in _environ(pid)):
                found[pid] = Process(stat.program, pid, stat.start_ticks)
    return list(found.values())


def _environ(pid: int) -> list[bytes]:
    """A process's environment, as far as we may see it."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []
