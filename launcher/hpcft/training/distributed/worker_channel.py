"""Channel from a rank's worker to its supervisor: heartbeats, stacks and exit codes.

The training thread itself sends heartbeats, between the parts of its work: a thread of their own
would keep sending them while the training hangs. A heartbeat is a short line in a pipe; if the pipe
is full, it is dropped, so that sending never blocks. On SIGUSR1 the stacks of all threads are
written into a file in memory, which needs neither a folder nor a running Python thread.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import time
from typing import NamedTuple

STARTING = "starting"
"""Phase of a worker's first heartbeat."""
OUT_OF_MEMORY_EXIT = 86
"""Exit code of a worker that ran out of memory and may be restarted with a fallback."""
SAVED_EXIT = 87
"""Exit code of a worker that ended after a stop request, with its progress saved."""


class Heartbeat(NamedTuple):
    """A sign of life of a worker."""

    at: float
    """Time of `time.monotonic`, whose clock all processes of a node share."""
    phase: str
    """Phase of the worker, as in `Progress`."""
    step: int
    """Optimizer steps, or examples, that are done."""


class HeartbeatSender:
    """The worker's end of the pipe."""

    def __init__(self, pipe: int | None = None) -> None:
        """Takes the pipe's descriptor; without one, heartbeats are dropped."""
        self._pipe = pipe

    def send(self, phase: str, step: int) -> None:
        """Sends a heartbeat; never blocks."""
        if self._pipe is None:
            return
        line = f"{time.monotonic():.4f} {phase} {step}\n"
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._pipe, line.encode())


def connect(pipe: int, stacks: int) -> HeartbeatSender:
    """Connects to the supervisor: sends the first heartbeat, and writes stacks on SIGUSR1.

    Args:
        pipe: descriptor of the pipe, inherited from the supervisor.
        stacks: descriptor of a file in memory, inherited too.
    """
    for inherited in (pipe, stacks):
        os.set_inheritable(inherited, False)
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    heartbeats = HeartbeatSender(pipe)
    heartbeats.send(STARTING, 0)
    return heartbeats


def parse_heartbeat(line: str) -> Heartbeat:
    """Parses a line of the pipe."""
    at, phase, step = line.split()
    return Heartbeat(float(at), phase, int(step))
