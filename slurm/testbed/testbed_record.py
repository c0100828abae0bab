"""Records the daemons of a cluster in its folder, and starts and ends them by that record."""

from __future__ import annotations

import contextlib
import fcntl
import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import testbed_daemons as daemons
from testbed_daemons import Process
from testbed_folder import Layout, Shape, TestbedError


@dataclass
class Record:
    """Content of `testbed.json`."""

    shape: Shape
    """Size of the cluster."""
    port: int
    """First of the cluster's ports: controller, slurmdbd, database, then the nodes."""
    processes: dict[str, Process] = field(default_factory=dict)
    """Daemon to its process."""

    @classmethod
    def read(cls, path: Path) -> Record | None:
        """Reads a record; returns None if there is no such file.

        Raises:
            TestbedError: the file holds no record.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            processes = {name: Process(**values) for name, values in data["processes"].items()}
            return cls(Shape(**data["shape"]), int(data["port"]), processes)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise TestbedError(f"{path}: is no record of a testbed ({error})") from error

    def write(self, path: Path) -> None:
        """Writes the record atomically: a reader sees the old or the new one."""
        new = path.with_suffix(".new")
        new.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        new.replace(path)


class Supervisor:
    """Starts and ends the daemons of one folder, by its record."""

    def __init__(self, layout: Layout) -> None:
        """Reads the record of the folder."""
        self.layout = layout
        self._record = Record.read(layout.record)

    @property
    def env(self) -> dict[str, str]:
        """Variables with which Slurm's clients find this cluster."""
        return {"SLURM_CONF": str(self.layout.slurm_conf)}

    @property
    def record(self) -> Record:
        """Record of the folder.

        Raises:
            TestbedError: no cluster was started here.
        """
        if self._record is None:
            raise TestbedError(f"there is no cluster in {self.layout.root}")
        return self._record

    def replace(self, record: Record) -> None:
        """Replaces the record by that of another cluster."""
        record.write(self.layout.record)
        self._record = record

    def states(self) -> dict[str, bool]:
        """Returns whether each daemon of the cluster runs, in the order in which they start."""
        if self._record is None:
            return {}
        names = ["munged"]
        names += ["mariadbd", "slurmdbd"] if self._record.shape.accounting else []
        names += ["slurmctld", *(f"slurmd-{node}" for node in self._record.shape.node_names)]
        return {name: self.alive(name) for name in names}

    def alive(self, name: str) -> bool:
        """Returns whether a daemon runs."""
        process = self._record.processes.get(name) if self._record else None
        return process is not None and process.alive()

    def launch(self, name: str, program: str, *options: str) -> None:
        """Starts a daemon unless it runs, and records it at once."""
        if self.alive(name):
            return
        argv = [daemons.find_programs([program])[program], *options]
        output = self.layout.log(name).with_suffix(".out")
        process = daemons.spawn(argv, daemons.client_env(self.env), output, self.layout.root)
        self.record.processes[name] = process
        self.record.write(self.layout.record)

    def signal(self, name: str, number: signal.Signals) -> None:
        """Sends a signal to a daemon.

        Raises:
            TestbedError: the daemon does not run.
        """
        if not self.alive(name):
            raise TestbedError(f"{name} does not run")
        self.record.processes[name].signal(number)

    def wait_ready(self, name: str, ready: Callable[[], bool], timeout_s: float) -> None:
        """Waits until a daemon is ready.

        Raises:
            TestbedError: the daemon ended, or time ran out; the message holds the end of its log.
        """
        is_ready = False

        def is_ready_or_dead() -> bool:
            nonlocal is_ready
            with contextlib.suppress(TestbedError):  # A client asked too early.
                is_ready = ready()
            return is_ready or not self.alive(name)

        daemons.wait_until(is_ready_or_dead, timeout_s)
        if is_ready:
            return
        what = f"not ready within {timeout_s:g} s" if self.alive(name) else "ended at once"
        log = self.layout.log(name)
        if not log.exists() or not log.stat().st_size:
            log = log.with_suffix(".out")
        lines = (
            log.read_text(errors="replace", encoding="utf-8").splitlines()[-5:]
            if log.exists()
            else []
        )
        raise TestbedError("\n  ".join([f"{name}: {what}; the end of {log}:", *lines]))

    def end(self, *names: str, timeout_s: float = 20.0) -> None:
        """Ends daemons, waits for them, and removes them from the record."""
        processes = self.record.processes
        daemons.terminate([processes[name] for name in names if name in processes], timeout_s)
        for name in names:
            processes.pop(name, None)
        self.record.write(self.layout.record)

    def call(self, program: str, *options: str, timeout_s: float = 20.0) -> str:
        """Runs a client of this cluster; returns its output.

        Raises:
            TestbedError: it failed, or did not answer in time.
        """
        argv = [daemons.find_programs([program])[program], *options]
        return daemons.call(argv, daemons.client_env(self.env), timeout_s)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder's lock, so that no other process starts or stops the cluster."""
        self.layout.root.mkdir(mode=0o755, parents=True, exist_ok=True)
        with self.layout.lock.open("w", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._record = Record.read(self.layout.record)
            yield
