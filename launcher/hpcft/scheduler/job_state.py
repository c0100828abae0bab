"""What a scheduler says of a job, in one set of words, and pending reasons in plain sentences."""

from __future__ import annotations

import pwd
import re
from dataclasses import dataclass

PENDING = {
    "PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD",
    "SPECIAL_EXIT",
}  # fmt: skip
ACTIVE = {"RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "SUSPENDED", "STOPPED", "RESIZING"}
FAILED = {
    "FAILED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "PREEMPTED",
    "CANCELLED", "REVOKED", "LAUNCH_FAILED", "RECONFIG_FAIL",
}  # fmt: skip
# What accounting may say of a job that Slurm has queued again since, by itself.
RESTARTABLE = {"NODE_FAIL", "BOOT_FAIL", "PREEMPTED", "TIMEOUT"}
COMPLETED = "COMPLETED"
UNKNOWN = "UNKNOWN"


@dataclass(frozen=True)
class JobState:
    """One reading of a job's state."""

    state: str
    """Slurm's word, without `+` and ` by <uid>`; UNKNOWN when nobody could say."""
    reason: str = ""
    """Why it pends, why the state is unknown, or who cancelled it."""
    nodes: str = ""
    """Node list."""
    elapsed_s: float | None = None
    """Seconds that it has run."""
    exit_code: str = ""
    """`code:signal` as sacct gives it."""
    ended_at: float | None = None
    """Unix time in seconds at which it ended, if that is known."""
    unknown_to_slurm: bool = False
    """Whether the controller has no such job any more, so that it cannot be alive."""

    @property
    def is_live(self) -> bool:
        """Whether the job is queued or runs."""
        return self.state in PENDING or self.state in ACTIVE

    @property
    def is_over(self) -> bool:
        """Whether it is known to have ended; not the opposite of `is_live`."""
        return self.state == COMPLETED or self.state in FAILED


def normalise_state(word: str) -> str:
    """`CANCELLED by 0` and `CANCELLED+` as `CANCELLED`."""
    words = word.strip().rstrip("+").split()
    return words[0].rstrip("+").upper() if words else UNKNOWN


def cancelled_by(word: str) -> str:
    """Who cancelled a job, of `CANCELLED by 1000`: `by anna`; empty of any other state."""
    match = re.fullmatch(r"CANCELLED by (\d{1,10})", word.strip())
    if match is None:
        return ""
    try:
        return f"by {pwd.getpwuid(int(match[1])).pw_name}"
    except (KeyError, OverflowError):
        return f"by the user {match[1]}"
