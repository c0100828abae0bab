"""Job, Progress and RunRecord: where a run is, how far, and what came out."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hpcft.core.records.base import Name, Positive, PositiveInt, StoredPart, StoredRecord
from hpcft.core.records.plan import ParameterCount
from hpcft.core.records.recovery import Recovery


class PhasePeaks(StoredPart):
    """The most that ranks held during a phase of a run, of all ranks that of the largest."""

    resident_bytes: int
    """Resident set of a rank's process."""
    host_bytes: int = 0
    """Sum of the resident sets of a node's ranks."""
    allocated_bytes: int | None = None
    """Device memory in tensors; None on a CPU."""
    reserved_bytes: int | None = None
    """Device memory that the allocator held; None on a CPU."""
    device_bytes: int | None = None
    """Device memory in use, context and communicators included, without what the plan says that
    others hold; None on a CPU."""


class Measurement(StoredPart):
    """What a run really took."""

    wall_s: float
    """Seconds that the ranks ran, of all starts; what lay between those does not count."""
    train_s: float | None = None
    """Seconds of training alone."""
    gpu_hours: float
    """Ranks × hours; on a CPU, rank-hours."""
    peak_memory_bytes: int
    """Largest peak of one rank: device memory reserved on a GPU, resident set on a CPU."""
    peak_host_bytes: int
    """Largest sum of resident sets over the ranks of a node."""
    tokens_per_s: float | None = None
    """Training tokens per second over all ranks."""
    phases: dict[str, PhasePeaks] = Field(default_factory=dict)
    """Phase, as in the heartbeat, to its peaks: `model` (loading), `training`, `evaluation`, …"""
    step_s: Positive | None = None
    """Median time of an optimizer step, the first ones left out."""
    timed_steps: int = 0
    """Steps that this median is of."""
    tokens_per_step: float | None = None
    """Training tokens (padding left out) of an optimizer step over all ranks."""

    @property
    def rank_bytes(self) -> int:
        """What compares with the prediction: all of a GPU that a rank used; on a CPU its peak."""
        used = [peaks.device_bytes or 0 for peaks in self.phases.values()]
        return max([self.peak_memory_bytes, *used])


class Prediction(StoredPart):
    """What the plan of a run predicted, in the parts that measurements tell something of."""

    tensor_bytes: int
    """Tensors of a rank at its peak."""
    communicator_bytes: int
    """Buffers of communicators on a GPU."""
    step_s: float
    """An optimizer step."""
    flops_s: float
    """What of it is the time of FLOPs: the rest is overhead, communication and offloading."""
    efficiency: float
    """Share of the peak FLOP/s that was taken for it."""
    tokens_per_step: PositiveInt
    """Tokens that it was taken for: every sequence as long as the recipe allows."""


class Confusion(StoredPart):
    """Which labels a model takes for which."""

    labels: list[str]
    """In the order of rows and columns."""
    counts: list[list[int]]
    """Examples by the label that they have (a row) and the one that they were given (a column); a
    last column without a label, if there is one, counts those that were given none."""


class RunRecord(StoredRecord):
    """What came out of a run that completed; written last, so that its presence means success."""

    run_id: str
    """Identity by content."""
    recipe: Name
    """Name of the recipe."""
    cluster: Name | Literal[""] = ""
    """Name of the profile."""
    finished_at: float
    """Unix time in seconds."""
    job_id: str = ""
    """Attempt that wrote it."""
    split: str = ""
    """Split that the metrics are of."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """Metric to value, after training."""
    intervals: dict[str, tuple[float, float]] = Field(default_factory=dict)
    """Metric to the ends of its 95 % interval, by a bootstrap over the examples."""
    confusion: Confusion | None = None
    """Of a classifier, unless it has too many labels to show."""
    metrics_before: dict[str, float] = Field(default_factory=dict)
    """Metric to value before training, where the recipe asked for it."""
    examples: dict[str, int] = Field(default_factory=dict)
    """Examples of each split."""
    notes: list[str] = Field(default_factory=list)
    """What the reader of the number should know (rows dropped, texts cut)."""
    parameters: ParameterCount | None = None
    """Counted on the model that was trained."""
    measured: Measurement | None = None
    """What it took."""
    recoveries: list[Recovery] = Field(default_factory=list)
    """What it met on its way; none where it went through as planned."""
    predicted_memory_bytes: int | None = None
    """The plan's peak per rank."""
    predicted: Prediction | None = None
    """Its parts, and the predicted time."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Versions of what computed the number."""

    @property
    def fallbacks(self) -> list[Recovery]:
        """Steps down the ladder that it needed; none where the plan held."""
        return [recovery for recovery in self.recoveries if recovery.change]
