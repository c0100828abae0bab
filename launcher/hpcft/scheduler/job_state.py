"""Defines the states of a job, in Slurm's words, for Slurm and for local jobs."""

from __future__ import annotations

import pwd
import re
from dataclasses import KW_ONLY, dataclass

PENDING = {
    "PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD",
    "SPECIAL_EXIT",
}  # fmt: skip
ACTIVE = {"RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "SUSPENDED", "STOPPED", "RESIZING"}
FAILED = {
    "FAILED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "PREEMPTED",
    "CANCELLED", "REVOKED", "LAUNCH_FAILED", "RECONFIG_FAIL",
}  # fmt: skip
# Accounting may still hold these states for a job that Slurm has requeued by itself since.
RESTARTABLE = {"NODE_FAIL", "BOOT_FAIL", "PREEMPTED", "TIMEOUT"}
COMPLETED = "COMPLETED"
UNKNOWN = "UNKNOWN"


@dataclass(frozen=True)
class JobState:
    """State of a job at one moment."""

    state: str
    """Slurm's word, without `+` and ` by <uid>`; UNKNOWN if no scheduler knows the state."""
    reason: str = ""
    """Why the job is pending, why its state is unknown, or who cancelled it."""
    _: KW_ONLY
    nodes: str = ""
    """Node list."""
    elapsed_s: float | None = None
    """Seconds that the job has run."""
    exit_code: str = ""
    """`code:signal` as sacct prints it."""
    ended_at: float | None = None
    """Unix time in seconds at which the job ended; None if it is not known."""
    unknown_to_slurm: bool = False
    """Whether the controller no longer has the job, so that the job cannot be alive."""
    origin: str | None = None
    """Comment and script of the job, which tell it from another one with the same id; None if they
    are not known."""

    @property
    def is_live(self) -> bool:
        """Whether the job is queued or runs."""
        return self.state in PENDING or self.state in ACTIVE

    @property
    def is_over(self) -> bool:
        """Whether the job is known to have ended; an UNKNOWN job is neither live nor over."""
        return self.state == COMPLETED or self.state in FAILED


NOT_QUEUED = JobState("FAILED", "was not queued: the submitting command was interrupted")
"""State of an attempt whose job no scheduler has ever had."""


def normalise_state(word: str) -> str:
    """Returns the bare state: `CANCELLED` for `CANCELLED by 0` and `CANCELLED+`."""
    words = word.strip().rstrip("+").split()
    return words[0].rstrip("+").upper() if words else UNKNOWN


def cancelled_by(word: str) -> str:
    """Returns who cancelled a job: `by anna` for `CANCELLED by 1000`; empty for other states."""
    match = re.fullmatch(r"CANCELLED by (\d{1,10})", word.strip())
    if match is None:
        return ""
    try:
        return f"by {pwd.getpwuid(int(match[1])).pw_name}"
    except (KeyError, OverflowError):
        return f"by the user {match[1]}"
