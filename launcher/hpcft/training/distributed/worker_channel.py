"""Signs of life: what a rank's training tells its supervisor, through a pipe between the two.

The thread that trains beats itself, between the pieces of its work: one that did nothing else would
go on beating while the training hangs. A beat is a short line; a full pipe loses it, and no beat
ever waits. On SIGUSR1 the stacks of all threads go into a file in memory, which needs neither a
folder nor a thread of Python that still runs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import time
from typing import NamedTuple

STARTING = "starting"


class Heartbeat(NamedTuple):
    """One sign of life."""

    at: float
    """`time.monotonic`, which all processes of a node share."""
    phase: str
    """What the rank does, in the words of `Progress`."""
    step: int
    """Optimizer steps, or examples, that it has done."""


class HeartbeatSender:
    """The training's end of the pipe."""

    def __init__(self, pipe: int | None = None) -> None:
        """Where beats go; nowhere without a supervisor."""
        self._pipe = pipe

    def beat(self, phase: str, step: int) -> None:
        """Tells that this rank is at work."""
        if self._pipe is None:
            return
        line = f"{time.monotonic():.4f} {phase} {step}\n"
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._pipe, line.encode())


def connect(pipe: int, stacks: int) -> HeartbeatSender:
    """Begins to beat, and to answer SIGUSR1 with the stacks of all threads.

    Args:
        pipe: inherited from the supervisor, to write to.
        stacks: a file in memory, inherited too.
    """
    for inherited in (pipe, stacks):
        os.set_inheritable(inherited, False)
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    beats = HeartbeatSender(pipe)
    beats.beat(STARTING, 0)
    return beats


def read(line: str) -> Heartbeat:
    """A line of the pipe."""
    at, phase, step = line.split()
    return Heartbeat(float(at), phase, int(step))


OUT_OF_MEMORY_EXIT = 86
"""Exit code that asks the supervisor for a start with less memory."""


SAVED_EXIT = 87
"""Exit code of a rank that was told to end, and of which nothing worth it is lost."""
