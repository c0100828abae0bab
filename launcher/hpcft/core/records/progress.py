"""Progress: the heartbeat of a running job."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hpcft.core.records.base import StoredRecord, renamed_from


class Progress(StoredRecord):
    """The heartbeat: how far a run is, rewritten whole every few seconds by rank 0."""

    phase: Literal["starting", "data", "model", "training", "evaluation", "saving", "done"]
    """What the run is doing."""
    updated_at: float
    """Unix time in seconds of this heartbeat."""
    started_at: float
    """Unix time at which the ranks started, for the last time."""
    ranks: int = 1
    """As many."""
    previous_s: float = Field(default=0.0, validation_alias=renamed_from("earlier_s", "previous_s"))
    """Seconds that they ran in earlier starts."""
    previous_rank_s: float = Field(
        default=0.0, validation_alias=renamed_from("earlier_rank_s", "previous_rank_s")
    )
    """The sum over ranks of those."""
    job_id: str = ""
    """Attempt that wrote it."""
    node: str = ""
    """Node of rank 0."""
    step: int = 0
    """Optimizer steps done; of a run that trains nothing, examples."""
    total_steps: int = 0
    """As many in all."""
    epoch: float = 0.0
    """Epochs done."""
    loss: float | None = None
    """Latest training loss."""
    learning_rate: float | None = None
    """Current learning rate."""
    tokens_per_s: float | None = None
    """Tokens (padding left out) per second over all ranks."""
    memory_bytes: int | None = None
    """Memory of rank 0 now: device memory on a GPU, resident set on a CPU."""
    peak_memory_bytes: int | None = None
    """Its peak."""
    eta_s: float | None = None
    """Seconds to the last step at the current speed."""

    def ran_s(self) -> tuple[float, float]:
        """Seconds that ranks ran until this heartbeat, in all starts; and their sum over ranks."""
        last_s = self.updated_at - self.started_at
        return self.previous_s + last_s, self.previous_rank_s + last_s * self.ranks
