"""Faults of the soak test: each is injected into one real run, at a random time."""

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

# Shares of the runs. The shortest time limit of Slurm is a minute.
WEIGHTS = {"none": 4, "kill_worker": 4, "kill_supervisor": 3, "cancel": 2, "requeue": 4,
           "node_down": 2, "stop": 3, "time_limit": 1}  # fmt: skip
# Latest time of a fault after the start of the job: loading takes about 8 s, training the rest.
LATEST_S = 14.0
STOPPED_S = 4.0
RETRY_S = 0.5
TRIES = 40
DOWN_S = 20.0
# Options of a run that reaches its time limit: more steps than fit into a minute.
LONG = ["-o", "resources.time_min=1", "-o", "train.max_steps=3000"]


@dataclass
class Run:
    """One run, and its fault."""

    fault: str
    """Name of the fault, a key of `WEIGHTS`."""
    after_s: float
    """Seconds from the start of the job to the fault."""
    folder: Path = Path()
    """Run folder, once the run is submitted."""
    job_id: str = ""
    """Id of the first job."""
    hit: bool = False
    """Whether the run was alive when the fault was injected."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Final state, note and number of recoveries, as hpcft reports them."""

    @property
    def expected_state(self) -> str:
        """Expected final state."""
        return "CANCELLED" if self.fault == "cancel" and self.hit else "COMPLETED"


def draw_runs(count: int, seed: int, *, singly: bool) -> list[Run]:
    """Draws a random fault for each run.

    Args:
        count: number of runs.
        seed: seed of the faults and of their times.
        singly: whether each run is a job of its own, which may have a short time limit.
    """
    dice = random.Random(seed)
    kinds = [kind for kind in WEIGHTS if singly or kind != "time_limit"]
    weights = [WEIGHTS[kind] for kind in kinds]
    return [Run(kind, dice.uniform(0, LATEST_S)) for kind in dice.choices(kinds, weights, k=count)]


Steps = Iterator[float]


def none(run: Run, testbed: Any) -> Steps:
    """Does nothing."""
    yield from ()


def kill_worker(run: Run, testbed: Any) -> Steps:
    """Kills the worker."""
    yield from _signal_once(run, worker_pids, signal.SIGKILL)


def kill_supervisor(run: Run, testbed: Any) -> Steps:
    """Kills the supervisor."""
    yield from _signal_once(run, lambda folder: supervisor_pids(folder).values(), signal.SIGKILL)


def cancel(run: Run, testbed: Any) -> Steps:
    """Cancels the job, as its user does."""
    lives = _output_of("squeue", "-h", "-j", run.job_id, "-o", "%T") in ("PENDING", "RUNNING")
    run.hit = lives and _succeeds("scancel", run.job_id)  # It accepts a job that has ended too.
    yield from ()


def requeue(run: Run, testbed: Any) -> Steps:
    """Requeues the job, as an administrator does."""
    run.hit = _succeeds("scontrol", "requeue", run.job_id)
    yield from ()


def node_down(run: Run, testbed: Any) -> Steps:
    """Takes the node of the job down, and up again."""
    nodes = _output_of("squeue", "-h", "-j", run.job_id, "-o", "%N")
    if nodes:
        testbed.set_node(nodes, "drain")  # Else it would be up at once.
        testbed.set_node(nodes, "down")
        run.hit = True
        yield DOWN_S
        with contextlib.suppress(TestbedError):  # Another run's fault may have resumed it.
            testbed.set_node(nodes, "resume")


def stop(run: Run, testbed: Any) -> Steps:
    """Stops the worker for some seconds, which is too short for a hang."""
    yield from _signal_once(run, worker_pids, signal.SIGSTOP)
    if run.hit:
        yield STOPPED_S
        _send(worker_pids(run.folder), signal.SIGCONT)


def time_limit(run: Run, testbed: Any) -> Steps:
    """Does nothing: the run trains for longer than its time limit."""
    run.hit = True
    yield from ()


FAULTS: dict[str, Callable[[Run, Any], Steps]] = {
    "none": none,
    "kill_worker": kill_worker,
    "kill_supervisor": kill_supervisor,
    "cancel": cancel,
    "requeue": requeue,
    "node_down": node_down,
    "stop": stop,
    "time_limit": time_limit,
}


class Agenda:
    """Schedule of the faults and of what undoes them."""

    def __init__(self, testbed: Any) -> None:
        """Starts with an empty schedule on a testbed."""
        self.testbed = testbed
        self.due: list[tuple[float, Steps]] = []

    def add(self, run: Run) -> None:
        """Schedules a run's fault, `after_s` seconds from now."""
        steps = FAULTS[run.fault](run, self.testbed)
        self.due.append((time.monotonic() + run.after_s, steps))

    def work(self) -> None:
        """Injects the faults that are due."""
        now = time.monotonic()
        ready = [steps for at, steps in self.due if at <= now]
        self.due = [(at, steps) for at, steps in self.due if at > now]
        for steps in ready:
            wait_s = next(steps, None)
            if wait_s is not None:
                self.due.append((time.monotonic() + wait_s, steps))


def _signal_once(run: Run, find_pids: Callable[[Path], Iterable[int]], signum: int) -> Steps:
    """Signals processes of the run once they have started; the run may have ended before."""
    for _ in range(TRIES):
        run.hit = _send(find_pids(run.folder), signum)
        if run.hit:
            return
        yield RETRY_S


def _send(pids: Iterable[int], signum: int) -> bool:
    """Signals processes; returns whether any of them was alive."""
    sent = False
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)
            sent = True
    return sent


def _output_of(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.strip()


def _succeeds(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0
