"""Progress: the heartbeat of a running job."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hpcft.core.records.base import StoredRecord, renamed_from


class Progress(StoredRecord):
    """The heartbeat of a run, which rank 0 rewrites every few seconds."""

    phase: Literal["starting", "data", "model", "training", "evaluation", "saving", "done"]
    """Phase that the run is in."""
    updated_at: float
    """Unix time of this heartbeat, in seconds."""
    started_at: float
    """Unix time at which the latest job began, in seconds: its time is charged from then on."""
    ranks: int = 1
    """Number of ranks in this start."""
    previous_s: float = Field(default=0.0, validation_alias=renamed_from("earlier_s", "previous_s"))
    """Seconds that earlier jobs of the run took, from their start to their last heartbeat."""
    previous_rank_s: float = Field(
        default=0.0, validation_alias=renamed_from("earlier_rank_s", "previous_rank_s")
    )
    """Sum over all ranks of the seconds that earlier jobs of the run took."""
    job_id: str = ""
    """Job id of the attempt that wrote it."""
    node: str = ""
    """Node that rank 0 runs on."""
    step: int = 0
    """Optimizer steps done; examples done in a run that only evaluates."""
    total_steps: int = 0
    """Optimizer steps of the whole run; examples in a run that only evaluates; 0 if not known."""
    epoch: float = 0.0
    """Epochs of training done."""
    loss: float | None = None
    """Latest training loss."""
    learning_rate: float | None = None
    """Current learning rate."""
    tokens_per_s: float | None = None
    """Tokens (padding left out) per second over all ranks."""
    memory_bytes: int | None = None
    """Memory of rank 0 now: device memory on a GPU, resident set size on a CPU."""
    peak_memory_bytes: int | None = None
    """Peak memory of rank 0, measured like `memory_bytes`."""
    eta_s: float | None = None
    """Estimated seconds until the last step, at the current speed."""

    def ran_s(self) -> tuple[float, float]:
        """Returns the seconds that all jobs of the run took, and their sum over all ranks."""
        last_s = self.updated_at - self.started_at
        return self.previous_s + last_s, self.previous_rank_s + last_s * self.ranks
