"""RunRecord: the result of a completed run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hpcft.core.records.base import Name, Positive, PositiveInt, StoredPart, StoredRecord
from hpcft.core.records.plan import ParameterCount
from hpcft.core.records.recovery import Recovery


class PhasePeaks(StoredPart):
    """Peak memory of the ranks during a phase of a run; of all ranks, the largest."""

    resident_bytes: int
    """Resident set size of a rank's process, in bytes."""
    host_bytes: int = 0
    """Sum of the resident set sizes of all ranks of a node, in bytes."""
    allocated_bytes: int | None = None
    """GPU memory in tensors, in bytes; None on a CPU."""
    reserved_bytes: int | None = None
    """GPU memory that PyTorch's allocator reserved, in bytes; None on a CPU."""
    device_bytes: int | None = None
    """GPU memory in use, with the CUDA context and communicators and without what the plan expects
    other processes to hold, in bytes; None on a CPU."""


class Measurement(StoredPart):
    """Measured time and memory of a run."""

    wall_s: float
    """Seconds that all jobs of the run took, from the start of each, without pauses between."""
    train_s: float | None = None
    """Seconds of training alone; None if it was not measured."""
    gpu_hours: float
    """Ranks × hours that their jobs took, with start-up; on a CPU, rank hours."""
    peak_memory_bytes: int
    """Largest peak of a rank: GPU memory reserved, or resident set size on a CPU, in bytes."""
    peak_host_bytes: int
    """Largest sum of resident set sizes over the ranks of a node, in bytes."""
    tokens_per_s: float | None = None
    """Training tokens per second over all ranks."""
    phases: dict[str, PhasePeaks] = Field(default_factory=dict)
    """Peak memory by phase of the heartbeat: `model` (loading), `training`, `evaluation`, …"""
    step_s: Positive | None = None
    """Median seconds of an optimizer step, without the first steps."""
    timed_steps: int = 0
    """Number of steps in that median."""
    tokens_per_step: float | None = None
    """Training tokens (without padding) of an optimizer step over all ranks."""

    @property
    def rank_bytes(self) -> int:
        """Peak memory of a rank in bytes, as the plan predicts it: all of its GPU or CPU memory."""
        used = [peaks.device_bytes or 0 for peaks in self.phases.values()]
        return max([self.peak_memory_bytes, *used])


class Prediction(StoredPart):
    """The plan's prediction, in the parts that a run can measure."""

    tensor_bytes: int
    """Predicted tensors of a rank at its peak, in bytes."""
    communicator_bytes: int
    """Predicted communicator buffers on a GPU, in bytes."""
    step_s: float
    """Predicted seconds of an optimizer step."""
    flops_s: float
    """Predicted seconds of a step's FLOPs; the rest is overhead, communication and offloading."""
    efficiency: float
    """Share of the peak FLOP/s that the prediction assumed."""
    tokens_per_step: PositiveInt
    """Tokens per step that the prediction assumed."""
    device: str = ""
    """Name of the GPU that the plan was made for; `cpu` without one."""
    precision: str = ""
    """Compute precision of the plan."""
    layout: str = ""
    """Kind of layout that the plan chose."""
    size: str = ""
    """Size class of the model."""


class Confusion(StoredPart):
    """Confusion matrix of a classifier."""

    labels: list[str]
    """Labels, in the order of rows and columns."""
    counts: list[list[int]]
    """Number of examples by true label (row) and predicted label (column). A last column without a
    label, if there is one, counts the examples without a prediction."""


class RunRecord(StoredRecord):
    """The result of a completed run; written last, so that its presence means success."""

    run_id: str
    """Run id: a hash of the run's content."""
    recipe: Name
    """Name of the recipe."""
    cluster: Name | Literal[""] = ""
    """Name of the cluster profile."""
    finished_at: float
    """Unix time of the end, in seconds."""
    job_id: str = ""
    """Job id of the attempt that wrote it."""
    split: str = ""
    """Split that the metrics were computed on."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """Value of each metric after training."""
    intervals: dict[str, tuple[float, float]] = Field(default_factory=dict)
    """Ends of each metric's 95 % interval, from a bootstrap over the examples."""
    confusion: Confusion | None = None
    """Confusion matrix of a classifier; None if it has too many labels to show."""
    metrics_before: dict[str, float] = Field(default_factory=dict)
    """Value of each metric before training, if the recipe asks for it."""
    examples: dict[str, int] = Field(default_factory=dict)
    """Number of examples of each split."""
    notes: list[str] = Field(default_factory=list)
    """Notes for the reader of the result (rows dropped, texts cut)."""
    doubts: list[str] = Field(default_factory=list)
    """Reasons to doubt the result: a loss that rose, a score below that of a constant answer. They
    are among the notes too."""
    parameters: ParameterCount | None = None
    """Parameters of the trained model, counted on it."""
    measured: Measurement | None = None
    """Measured time and memory."""
    recoveries: list[Recovery] = Field(default_factory=list)
    """Recoveries of the run; empty if nothing interrupted it."""
    predicted_memory_bytes: int | None = None
    """Predicted peak memory per rank, in bytes."""
    predicted: Prediction | None = None
    """Prediction in parts: memory and time."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Versions of the software that computed the result, by package."""

    @property
    def fallbacks(self) -> list[Recovery]:
        """Out-of-memory fallbacks of the run; empty if the planned layout fitted."""
        return [recovery for recovery in self.recoveries if recovery.change]
