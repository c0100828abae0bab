"""What this process was told about its end: a signal that came, and the time limit of its job.

A signal may come at any instant, in the middle of a collective or of a file. So its handler only
notes it; the ranks agree on what to do at the end of a step (`boundary`).
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
"""Sent before a time limit or a preemption, by Slurm or by the supervisor."""


class StoppedAfterSave(BaseException):
    """This rank was told to end; what is worth it is saved, and nobody is to blame."""


@dataclass
class StopRequest:
    """What was told so far."""

    signum: int | None = None
    """Signal that told to end; None: nobody did."""
    deadline: float | None = None
    """Unix time at which the scheduler ends the job; None where it does not say."""

    def has_to_end(self, needed_s: float) -> bool:
        """Whether this process was told to end, or its job will be before so many seconds pass."""
        late = self.deadline is not None and time.time() + needed_s > self.deadline
        return self.signum is not None or late


stop_request = StopRequest()


def install() -> None:
    """Notes signals from now on; call it first, in the main thread."""
    own = os.getpid()

    def note(signum: int, _frame: FrameType | None) -> None:
        if os.getpid() == own:
            stop_request.signum = signum
        else:  # a process that was forked from this one, and that nobody waits for to save
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    for signum in SIGNALS:
        signal.signal(signum, note)
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    stop_request.deadline = float(end) if end.isdecimal() else None


def ignore_stop_signals() -> None:
    """Has a data worker ignore what its parent is told: that one still needs it for its step."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
