"""The faults of the soak: each is done for real to one run, at a random instant of it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from real_runs import supervisor_pids, worker_pids
from testbed_folder import TestbedError

# Shares of the runs. A time limit takes a minute of training: the least that Slurm takes.
WEIGHTS = {"none": 4, "kill_child": 4, "kill_supervisor": 3, "cancel": 2, "requeue": 4,
           "node_down": 2, "stop": 3, "time_limit": 1}  # fmt: skip
# From the start of a run's job to its fault: loading takes about 8 s, training the rest.
LATEST_S = 14.0
STOPPED_S = 4.0
AGAIN_S = 0.5
TRIES = 40
DOWN_S = 20.0
# Runs that meet their time limit: more steps than a minute has.
LONG = ["-o", "resources.time_min=1", "-o", "train.max_steps=3000"]


@dataclass
class Run:
    """One run, and what is done to it."""

    fault: str
    """A key of `WEIGHTS`."""
    after_s: float
    """From the start of its job to the fault."""
    folder: Path = Path()
    """Its run folder, once it is submitted."""
    job_id: str = ""
    """Its first job."""
    hit: bool = False
    """Whether the fault came in time to meet it."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the product tells of it in the end."""

    @property
    def expected(self) -> str:
        """The state in which it has to end."""
        return "CANCELLED" if self.fault == "cancel" and self.hit else "COMPLETED"


def drawn(count: int, seed: int, *, singly: bool) -> list[Run]:
    """Runs with a random fault each; only one that is submitted singly has a time limit of its own.

    Args:
        count: how many.
        seed: draws the same faults at the same instants again.
        singly: whether each is a job of its own.
    """
    dice = random.Random(seed)
    kinds = [kind for kind in WEIGHTS if singly or kind != "time_limit"]
    weights = [WEIGHTS[kind] for kind in kinds]
    return [Run(kind, dice.uniform(0, LATEST_S)) for kind in dice.choices(kinds, weights, k=count)]


Steps = Iterator[float]


def none(run: Run, testbed: Any) -> Steps:
    """Nothing is done."""
    yield from ()


def kill_child(run: Run, testbed: Any) -> Steps:
    """The training process is killed."""
    yield from _signal_once(run, worker_pids, signal.SIGKILL)


def kill_supervisor(run: Run, testbed: Any) -> Steps:
    """The process that watches over the training is killed."""
    yield from _signal_once(run, lambda folder: supervisor_pids(folder).values(), signal.SIGKILL)


def cancel(run: Run, testbed: Any) -> Steps:
    """Its user cancels the job."""
    lives = _asked("squeue", "-h", "-j", run.job_id, "-o", "%T") in ("PENDING", "RUNNING")
    run.hit = lives and _done("scancel", run.job_id)  # that of an ended job is fine, too
    yield from ()


def requeue(run: Run, testbed: Any) -> Steps:
    """An administrator requeues the job."""
    run.hit = _done("scontrol", "requeue", run.job_id)
    yield from ()


def node_down(run: Run, testbed: Any) -> Steps:
    """Its node goes down, with all that runs there, and comes back."""
    nodes = _asked("squeue", "-h", "-j", run.job_id, "-o", "%N")
    if nodes:
        testbed.set_node(nodes, "drain")  # or it would be back at once, with the same jobs there
        testbed.set_node(nodes, "down")
        run.hit = True
        yield DOWN_S
        with contextlib.suppress(TestbedError):  # the fault of another run there has done so
            testbed.set_node(nodes, "resume")


def stop(run: Run, testbed: Any) -> Steps:
    """The training process is stopped for some seconds: slow, not stuck."""
    yield from _signal_once(run, worker_pids, signal.SIGSTOP)
    if run.hit:
        yield STOPPED_S
        _signalled(worker_pids(run.folder), signal.SIGCONT)


def time_limit(run: Run, testbed: Any) -> Steps:
    """It trains for longer than its time limit; nothing else is done."""
    run.hit = True
    yield from ()


FAULTS: dict[str, Callable[[Run, Any], Steps]] = {
    "none": none,
    "kill_child": kill_child,
    "kill_supervisor": kill_supervisor,
    "cancel": cancel,
    "requeue": requeue,
    "node_down": node_down,
    "stop": stop,
    "time_limit": time_limit,
}


class Agenda:
    """What is to be done when: each fault, and what undoes it."""

    def __init__(self, testbed: Any) -> None:
        """Nothing is to be done yet.

        Args:
            testbed: the cluster.
        """
        self.testbed = testbed
        self.due: list[tuple[float, Steps]] = []

    def add(self, run: Run) -> None:
        """Does a run's fault, some seconds from now."""
        steps = FAULTS[run.fault](run, self.testbed)
        self.due.append((time.monotonic() + run.after_s, steps))

    def work(self) -> None:
        """Does what is due."""
        now = time.monotonic()
        ready = [steps for at, steps in self.due if at <= now]
        self.due = [(at, steps) for at, steps in self.due if at > now]
        for steps in ready:
            wait_s = next(steps, None)
            if wait_s is not None:
                self.due.append((time.monotonic() + wait_s, steps))


def _signal_once(run: Run, found: Callable[[Path], Iterable[int]], signum: int) -> Steps:
    """Signals a process of the run, which may have to start first; it may have ended, too."""
    for _ in range(TRIES):
        run.hit = _signalled(found(run.folder), signum)
        if run.hit:
            return
        yield AGAIN_S


def _signalled(pids: Iterable[int], signum: int) -> bool:
    """Whether there was a process to signal."""
    sent = False
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)
            sent = True
    return sent


def _asked(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.strip()


def _done(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0
