"""RankError and Recovery: the failures of a run, and how it continued after each."""

from __future__ import annotations

import time
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from hpcft.core.host import node_name
from hpcft.core.records.base import StoredRecord, renamed_from
from hpcft.core.records.plan import Layout

Action = Literal["retry_step", "restart", "requeue", "resubmit", "resume"]

# The first words of the names that hpcft 0.1 wrote, and today's names.
_RENAMED_ACTIONS = {
    "in-process": "retry_step",
    "restarted": "restart",
    "requeued": "requeue",
    "queued": "resubmit",
    "resumed": "resume",
}


def _renamed_action(value: object) -> object:
    return _RENAMED_ACTIONS.get(value.partition(" ")[0], value) if isinstance(value, str) else value


class RankError(StoredRecord):
    """The error that ended a rank, written by the rank itself."""

    rank: int
    """Global rank."""
    node: str
    """Node that the rank ran on."""
    at: float
    """Unix time of the error, in seconds."""
    kind: str
    """Name of the exception's class."""
    message: str
    """Text of the exception."""
    job_id: str = ""
    """Job id of the attempt that the rank belonged to."""
    phase: str = ""
    """Phase that the rank was in, as in `Progress`."""
    failure: str = ""
    """Class of the failure, if the rank could tell it better than its text does; else empty."""
    next_step: str = ""
    """Advice to the user, if the rank had a better one than the failure's class; else empty."""
    traceback: str = ""
    """Traceback for developers, which `hpcft logs` shows."""

    @classmethod
    def now(
        cls,
        rank: int,
        kind: str,
        message: str,
        *,
        node: str = "",
        job_id: str = "",
        phase: str = "",
        failure: str = "",
        next_step: str = "",
        traceback: str = "",
    ) -> RankError:
        """Returns an error at the current time, by default on this node."""
        return cls(
            rank=rank,
            node=node or node_name(),
            at=time.time(),
            kind=kind,
            message=message,
            job_id=job_id,
            phase=phase,
            failure=failure,
            next_step=next_step,
            traceback=traceback,
        )


class Recovery(StoredRecord):
    """A failure of a run, and how the run continued; with a `change`, it is a fallback."""

    number: int
    """Number of the recovery, from 1, in order of time."""
    at: float
    """Unix time of the failure, in seconds."""
    job_id: str
    """Job id of the attempt that failed."""
    restart: int = 0
    """Number of times that Slurm had restarted this job before."""
    rank: int = 0
    """Global rank that failed first."""
    node: str = ""
    """Node of the rank that failed first."""
    cause: str
    """Class of the failure: `out_of_memory`, `timeout`, `preempted`, `rank_died`, …"""
    evidence: str
    """Decisive line about the failure, for example of a log."""
    action: Annotated[Action, BeforeValidator(_renamed_action)] = Field(
        validation_alias=renamed_from("how", "action")
    )
    """How the run continued: the processes retried the step, all ranks restarted within their
    allocation, Slurm requeued the job, hpcft submitted another job, or a person resumed the run."""
    step: int = 0
    """Optimizer step that the run resumes from; examples done in a run that only evaluates."""
    change: str = ""
    """Change that a fallback made, for example `micro-batch 8 → 4`; else empty."""
    layout: Layout
    """Layout of the run from here on; the global batch does not change."""
    per_device_eval_batch_size: int
    """Examples per rank and forward pass when scoring, from here on."""
    excluded: list[str] = Field(default_factory=list)
    """Nodes that the run avoids from here on."""
