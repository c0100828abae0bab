"""Checkpoint: the record that marks a checkpoint as complete."""

from __future__ import annotations

from pydantic import Field

from hpcft.core.records.base import Precision, StoredRecord, renamed_from
from hpcft.core.records.plan import Layout


class Checkpoint(StoredRecord):
    """The record in a checkpoint's folder, written last: with it, the checkpoint is complete.

    It also holds the state of hpcft that the Hugging Face Trainer does not save.
    """

    step: int
    """Optimizer steps done at the checkpoint."""
    at: float
    """Unix time of the checkpoint, in seconds."""
    user_requested: bool = Field(validation_alias=renamed_from("asked", "user_requested"))
    """Whether `train.save_strategy` asked for it; otherwise it is there only to resume from."""
    layout: Layout
    """Layout of the run that wrote it."""
    precision: Precision
    """Compute precision of the run that wrote it."""
    files: dict[str, int]
    """Size in bytes of every file in the folder, by relative path."""
    checksums: dict[str, str] = Field(default_factory=dict)
    """XXH3 checksum of every file in the folder, by relative path; empty before hpcft 0.2."""
    tag: str = ""
    """Name of DeepSpeed's own folder inside it; empty without DeepSpeed."""
    metrics_bytes: int
    """Size of metrics.jsonl in bytes; lines after it are of steps that a resumed run repeats."""
    losses: list[float]
    """Sum of the losses since the last line of metrics.jsonl, for each rank."""
    logged_loss: float
    """Sum of all losses before the last line of metrics.jsonl."""
    logged_step: int
    """Optimizer step of the last line of metrics.jsonl."""
    train_s: float
    """Seconds of training so far, over all starts of the run."""
    save_s: float | None = None
    """Seconds that writing the previous checkpoint took; None for the first one."""
    notes: list[str] = Field(default_factory=list)
    """Notes of earlier starts for the reader of the result."""
