"""Faults that interrupt a real run on the testbed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterable
from typing import Any

from on_slurm import slurm

from hpcft.core import files
from hpcft.core.paths import RunPaths
from hpcft.core.records import Job, Recovery
from hpcft.recovery import log
from real_runs import folder_of, supervisor_pids, until, worker_pids


def job(name: str) -> Job:
    """Returns the job record of a recipe's only run."""
    return files.read_record(folder_of(name) / "job.json", Job)


def job_id(name: str) -> str:
    """Returns the id of the latest job of a recipe's only run."""
    latest = job(name).attempts[-1].job_id
    assert latest
    return latest


def recoveries_of(name: str) -> list[Recovery]:
    """Returns the recoveries of a recipe's only run, in order."""
    return log.read_recoveries(RunPaths(folder_of(name)))


def notice(name: str, testbed: Any) -> None:
    """Sends Slurm's signal before a time limit, or before a preemption with notice."""
    slurm("scancel", "--signal=USR2", job_id(name))


def by_hand(name: str, testbed: Any) -> None:
    """Requeues the job, as an administrator does."""
    slurm("scontrol", "requeue", job_id(name))


def killed_worker(name: str, testbed: Any) -> None:
    """Kills the worker of one rank."""
    _kill(worker_pids(folder_of(name)))


def killed_supervisor(name: str, testbed: Any) -> None:
    """Kills the supervisor of one rank."""
    _kill(supervisor_pids(folder_of(name)).values())


def preempted(name: str, testbed: Any) -> None:
    """Submits a job of higher priority, which takes a node."""
    slurm("sbatch", "-p", "high", "-w", _node(name), "--exclusive", "-o", "/dev/null",
          "--wrap", "true")  # fmt: skip


def node_down(name: str, testbed: Any) -> None:
    """Takes a node down, and up again."""
    node = _node(name)
    testbed.set_node(node, "down")
    until(lambda: "RUNNING" not in slurm("squeue", "-h", "-j", job_id(name), "-o", "%T"))
    # A node that responds comes back by itself; Slurm then refuses to resume it.
    command = ["scontrol", "update", f"NodeName={node}", "State=resume"]
    subprocess.run(command, capture_output=True, check=False)


def _kill(pids: Iterable[int]) -> None:
    """Kills one of these processes."""
    os.kill(random.choice([*pids]), signal.SIGKILL)


def _node(name: str) -> str:
    nodes = slurm("squeue", "-h", "-j", job_id(name), "-o", "%N").strip()
    return slurm("scontrol", "show", "hostnames", nodes).split()[0]


FAULTS: dict[str, Callable[[str, Any], None]] = {
    fault.__name__: fault
    for fault in (notice, by_hand, killed_worker, killed_supervisor, preempted, node_down)
}
