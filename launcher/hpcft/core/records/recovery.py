"""Recovery and RankError: what interrupted a run and how it continued."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from hpcft.core.host import node_name
from hpcft.core.records.base import StoredRecord, renamed_from
from hpcft.core.records.plan import Layout

Action = Literal["retry_step", "restart", "requeue", "resubmit", "resume"]

# What hpcft 0.1 wrote.
_OLD_ACTIONS = {
    "in-process": "retry_step",
    "restarted": "restart",
    "requeued": "requeue",
    "queued anew": "resubmit",
    "resumed": "resume",
}


def _action(value: Any) -> Any:
    return _OLD_ACTIONS.get(value, value) if isinstance(value, str) else value


class RankError(StoredRecord):
    """What a rank wrote about its own end."""

    rank: int
    """Global rank."""
    node: str
    """Node that it ran on."""
    at: float
    """Unix time in seconds."""
    kind: str
    """Class of the exception."""
    message: str
    """Its text."""
    job_id: str = ""
    """Attempt that it belonged to."""
    phase: str = ""
    """What the rank was doing, in the words of `Progress`."""
    failure: str = ""
    """Class of the failure, where the rank knew more than its text tells; else empty."""
    next_step: str = ""
    """What to do, where the rank knew it."""
    traceback: str = ""
    """For developers; shown by `hpcft logs`."""

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
        """Returns an error of this moment, by default of this node; arguments as of the record."""
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
    """What a run met on its way, and how it went on; a rung of the ladder is one with a change."""

    number: int
    """From 1, in the order in which they came."""
    at: float
    """Unix time in seconds."""
    job_id: str
    """Attempt that met it; of one that was queued anew, the one that ended with it."""
    restart: int = 0
    """How often Slurm had started this job again before."""
    rank: int = 0
    """Global rank that met it first."""
    node: str = ""
    """Node that it ran on."""
    cause: str
    """Class of the failure: `out_of_memory`, `timeout`, `preempted`, `rank_died`, …"""
    evidence: str
    """Line that tells of it."""
    action: Annotated[Action, BeforeValidator(_action)] = Field(
        validation_alias=renamed_from("how", "action")
    )
    """How the run continued: the same process retried the step, all ranks restarted within their
    allocation, Slurm requeued the job, another job was submitted, or a person resumed the run."""
    step: int = 0
    """Optimizer step that it goes on from; of a run that trains nothing, examples."""
    change: str = ""
    """Of a rung what was changed, for example `micro-batch 8 → 4`; else empty."""
    layout: Layout
    """How the run is laid out from here on; the global batch is the same."""
    per_device_eval_batch_size: int
    """Examples per rank and forward pass when scoring, from here on."""
    excluded: list[str] = Field(default_factory=list)
    """Nodes that the run keeps away from, from here on."""
