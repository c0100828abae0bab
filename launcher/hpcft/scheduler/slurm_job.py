"""Tells a Slurm job about itself, and requeues it; called from within the job only."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

from hpcft.core.errors import ClusterError
from hpcft.scheduler import slurm_commands
from hpcft.scheduler.sbatch import DEFAULT_VARIABLES

# Slurm sets these in a job for the GPUs that it allocates.
_GPU_VARIABLES = ("CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES",
                  "ZE_AFFINITY_MASK")  # fmt: skip


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
    if end:
        return float(end)
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


@contextlib.contextmanager
def without_job_env() -> Iterator[None]:
    """Hides the job's own variables, so that it submits another job as a login node would."""
    from submitit.helpers import clean_env

    user_variables = {"SLURM_CONF", *DEFAULT_VARIABLES.values()} & os.environ.keys()
    kept = {name: os.environ[name] for name in user_variables}
    with clean_env(_GPU_VARIABLES):
        os.environ.update(kept)
        yield
