"""Stop requests to this process: a signal that arrived, and the time limit of its job.

A signal can arrive in the middle of a collective or of a write. So the handler only records it, and
the ranks decide together at the end of a step (`trainer.save_callback`). `transformers` has a
callback that checkpoints on SIGTERM, but there each rank decides alone.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from types import FrameType

from hpcft.scheduler import slurm_job

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
"""Signals that Slurm or the supervisor sends before a time limit or a preemption."""


class StoppedAfterSave(BaseException):
    """Raised to end this rank after a stop request, once its progress is saved."""


@dataclass
class StopRequest:
    """Stop request: signal received and job deadline."""

    signum: int | None = None
    """Signal that arrived; None before any did."""
    deadline: float | None = None
    """Unix time at which the scheduler ends the job; None if it is not known."""
    job_id: str = ""
    """Slurm's id of this job, to ask whether its limit was raised; empty on all ranks but one."""

    def has_to_end(self, needed_s: float) -> bool:
        """Returns whether a signal has arrived, or the job ends within so many seconds.

        Before it says so because of the time limit, it asks Slurm whether an administrator has
        raised the limit meanwhile.
        """
        if self.signum is not None or not self._is_near_end(needed_s):
            return self.signum is not None
        if self.job_id:
            self.deadline = slurm_job.current_time_limit_at(self.job_id) or self.deadline
        return self._is_near_end(needed_s)

    def _is_near_end(self, needed_s: float) -> bool:
        return self.deadline is not None and time.time() + needed_s > self.deadline


stop_request = StopRequest()


def install() -> None:
    """Installs the signal handlers; call it first, in the main thread."""
    own_pid = os.getpid()

    def record(signum: int, _frame: FrameType | None) -> None:
        if os.getpid() == own_pid:
            stop_request.signum = signum
        else:  # A forked process inherited this handler, but it has nothing to save.
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    for signum in STOP_SIGNALS:
        signal.signal(signum, record)
    end_time = os.environ.get("SLURM_JOB_END_TIME", "")
    # The ranks agree to stop, so that it is enough if one of them knows the limit. Others would
    # stop at the old one after it was raised.
    if end_time.isdecimal() and os.environ.get("SLURM_PROCID", "0") == "0":
        stop_request.deadline = float(end_time)
        stop_request.job_id = slurm_job.current_job_id() if "SLURM_JOB_ID" in os.environ else ""


def ignore_stop_signals() -> None:
    """Ignores stop signals in a DataLoader worker, whose parent still needs its batches."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
