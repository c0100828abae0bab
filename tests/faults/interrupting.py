"""Ways to interrupt a run on the testbed, each done for real."""

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
    """The job record of a recipe's only run."""
    return files.read_record(folder_of(name) / "job.json", Job)


def job_id(name: str) -> str:
    """The id of its latest job."""
    known = job(name).attempts[-1].job_id
    assert known
    return known


def met(name: str) -> list[Recovery]:
    """What the run has met, in order."""
    return log.read_recoveries(RunPaths(folder_of(name)))


def notice(name: str, testbed: Any) -> None:
    """Slurm's word before a time limit, and before a preemption where the site sets so."""
    slurm("scancel", "--signal=USR2", job_id(name))


def by_hand(name: str, testbed: Any) -> None:
    """Somebody requeues the job."""
    slurm("scontrol", "requeue", job_id(name))


def killed_child(name: str, testbed: Any) -> None:
    """The training process of one rank is killed."""
    _kill(worker_pids(folder_of(name)))


def killed_supervisor(name: str, testbed: Any) -> None:
    """The process that watches over one rank is killed."""
    _kill(supervisor_pids(folder_of(name)).values())


def preempted(name: str, testbed: Any) -> None:
    """A job of higher priority takes a node."""
    slurm("sbatch", "-p", "high", "-w", _node(name), "--exclusive", "-o", "/dev/null",
          "--wrap", "true")  # fmt: skip


def node_down(name: str, testbed: Any) -> None:
    """A node fails, and comes back."""
    node = _node(name)
    testbed.set_node(node, "down")
    until(lambda: "RUNNING" not in slurm("squeue", "-h", "-j", job_id(name), "-o", "%T"))
    # A node that answers comes back by itself, and is then not to be resumed.
    command = ["scontrol", "update", f"NodeName={node}", "State=resume"]
    subprocess.run(command, capture_output=True, check=False)


def _kill(found: Iterable[int]) -> None:
    os.kill(random.choice([*found]), signal.SIGKILL)


def _node(name: str) -> str:
    nodes = slurm("squeue", "-h", "-j", job_id(name), "-o", "%N").strip()
    return slurm("scontrol", "show", "hostnames", nodes).split()[0]


FAULTS: dict[str, Callable[[str, Any], None]] = {
    fault.__name__: fault
    for fault in (notice, by_hand, killed_child, killed_supervisor, preempted, node_down)
}
