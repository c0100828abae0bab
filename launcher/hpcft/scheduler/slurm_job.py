"""Tells a Slurm job about itself, and requeues it; called from within the job only."""

from __future__ import annotations

import os
import re

from hpcft.core.errors import ClusterError
from hpcft.scheduler import slurm_commands


def current_job_id() -> str:
    """Returns the id of the job that this process belongs to, `123` or `123_4`."""
    array, element = (os.environ.get(f"SLURM_ARRAY_{part}_ID") for part in ("JOB", "TASK"))
    return f"{array}_{element}" if array else os.environ["SLURM_JOB_ID"]


def restart_count() -> int:
    """Returns how often Slurm has restarted this process's job; 0 without Slurm."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def time_limit_at(job_id: str) -> float | None:
    """Returns the Unix time at which a running job reaches its time limit; None if not known."""
    end = os.environ.get("SLURM_JOB_END_TIME")  # Set by Slurm since 23.02.
    return float(end) if end else current_time_limit_at(job_id)


def current_time_limit_at(job_id: str) -> float | None:
    """Asks Slurm for the Unix time at which a running job reaches its time limit.

    It differs from `time_limit_at` if an administrator has changed the limit since the job began.
    """
    try:
        return float(slurm_commands.run_command("squeue", "-h", "-j", job_id, "-o", "%e"))
    except (ClusterError, ValueError):
        return None


def node_address(node: str) -> str:
    """Returns the network address of a node in Slurm's configuration (`NodeAddr`).

    Raises:
        ClusterError: Slurm does not answer, or knows no address.
    """
    text = slurm_commands.run_command("scontrol", "show", "node", node, "--oneliner")
    match = re.search(r"\bNodeAddr=(\S+)", text)
    if not match:
        raise ClusterError(f"scontrol prints no NodeAddr of node {node}")
    return match[1]


def requeue(job_id: str) -> None:
    """Has Slurm end a job, or one element of an array, and start it again.

    Raises:
        ClusterError: Slurm refuses, or does not answer.
    """
    slurm_commands.run_command("scontrol", "requeue", job_id)
