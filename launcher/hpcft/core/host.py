"""Names this process's node and GPUs, and waits with a timeout."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable


def node_name() -> str:
    """Returns Slurm's name of this process's node; without Slurm, the machine's host name."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def visible_gpus() -> list[str] | None:
    """Returns the entries of CUDA_VISIBLE_DEVICES up to the first invalid one; None if not set.

    CUDA itself ignores an invalid entry and all behind it.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return None
    entries = (entry.strip() for entry in given.split(","))
    return list(itertools.takewhile(lambda entry: entry and not entry.startswith("-"), entries))


def wait_until(is_true: Callable[[], bool], timeout_s: float, poll_s: float) -> bool:
    """Waits until a condition is true; returns False at the timeout.

    Args:
        is_true: the condition; checked at once and after every pause.
        timeout_s: longest time to wait, in seconds.
        poll_s: pause between two checks, in seconds.
    """
    deadline = time.monotonic() + timeout_s
    while not is_true():
        if time.monotonic() > deadline:
            return False
        time.sleep(poll_s)
    return True
