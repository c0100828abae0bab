"""Checkpoint: what a run can go on from, and the mark that it was written whole."""

from __future__ import annotations

from pydantic import Field

from hpcft.core.records.base import Precision, StoredRecord, renamed_from
from hpcft.core.records.plan import Layout


class Checkpoint(StoredRecord):
    """Written last into a checkpoint's folder, so that its presence means that all of it is there.

    It also holds what the Trainer does not save of itself.
    """

    step: int
    """Optimizer steps done."""
    at: float
    """Unix time in seconds."""
    user_requested: bool = Field(validation_alias=renamed_from("asked", "user_requested"))
    """Whether `train.save_strategy` asked for it; if not, it is only there to go on from."""
    layout: Layout
    """How the run was laid out that wrote it."""
    precision: Precision
    """Type that it computed in."""
    files: dict[str, int]
    """Every file in the folder to its size in bytes."""
    tag: str = ""
    """Folder of DeepSpeed's part; empty where the run did without DeepSpeed."""
    metrics_bytes: int
    """Size of metrics.jsonl by then; later lines are of steps that are done again."""
    losses: list[float]
    """Of each rank the sum of the losses since the last line of metrics.jsonl."""
    logged_loss: float
    """Sum of all losses before that line."""
    logged_step: int
    """Step of that line."""
    train_s: float
    """Seconds of training so far, over all starts."""
    save_s: float | None = None
    """Seconds that the checkpoint before took to be written; None where it is the first."""
    notes: list[str] = Field(default_factory=list)
    """What the reader of the result should know of earlier starts."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Versions of what wrote it."""
