"""This process's node, and waiting with a deadline."""

from __future__ import annotations

import os
import time
from collections.abc import Callable


def node_name() -> str:
    """Returns Slurm's name of the node that this process runs on, or the machine's own."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def wait_until(is_true: Callable[[], bool], timeout_s: float, poll_s: float) -> bool:
    """Waits until something is true; returns whether it was in time.

    Args:
        is_true: is asked first at once, then after every pause.
        timeout_s: longest time to wait, in seconds.
        poll_s: pause between two questions, in seconds.
    """
    deadline = time.monotonic() + timeout_s
    while not is_true():
        if time.monotonic() > deadline:
            return False
        time.sleep(poll_s)
    return True
