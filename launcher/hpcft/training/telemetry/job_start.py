"""Finds out when this job began, from when on its time is charged: long before training starts.

Slurm sets `SLURM_JOB_START_TIME` since 23.02. Before, the start of `slurmstepd`, which starts the
ranks, is within a second or two of it. A local run is charged from the start of its controller.
"""

from __future__ import annotations

import os
import time

import psutil

_VARIABLE = "HPCFT_JOB_STARTED_AT"
_STARTERS = ("slurmstepd", "local_controller")


def worker_variable() -> dict[str, str]:
    """Returns the environment variable that tells a worker when its job began.

    It is for a supervisor, whose parent is Slurm's or hpcft's program that starts the ranks.
    """
    started_at = os.environ.get("SLURM_JOB_START_TIME") or f"{_process_started_at():.3f}"
    return {_VARIABLE: started_at}


def _process_started_at() -> float:
    """Returns the Unix time at which this process, or the program that starts the ranks, began."""
    own = psutil.Process()
    try:
        parent = own.parent()
        if parent is not None:
            words = " ".join([parent.name(), *parent.cmdline()])
            if any(starter in words for starter in _STARTERS):
                return float(parent.create_time())
    except psutil.Error:  # it may be hidden from other users
        pass
    return float(own.create_time())


def job_started_at() -> float:
    """Returns the Unix time at which the job of this worker began; now, if that is not known."""
    now = time.time()
    try:
        return min(float(os.environ[_VARIABLE]), now)
    except (KeyError, ValueError):
        return now
