"""Job, Progress and RunRecord: where a run is, how far, and what came out."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, JsonValue

from hpcft.records.base import Record
from hpcft.records.plan import ParameterCount


class Fingerprints(Record):
    """What the local files of a run were when it was submitted."""

    files: dict[str, str] = Field(default_factory=dict)
    """Dotted field of the recipe to content hash."""


class Attempt(Record):
    """One submission of a run."""

    job_id: str | None
    """Slurm's id (`123`, `123_4` in an array) or the local controller's process id; None until
    known."""
    token: str
    """Written before sbatch and sent as the job's comment: lets a later start adopt the job."""
    array_index: int | None = None
    """Element of the job array."""
    submitted_at: float
    """Unix time in seconds."""
    logs: str
    """Folder of submitit's logs."""
    host: str
    """Machine that submitted; a local process can only be asked about there."""
    process_started: float | None = None
    """Start time of the local controller, so that a recycled process id is not mistaken for it."""


class Job(Record):
    """Where a run was submitted: every attempt, the latest last."""

    run_id: str
    """Identity by content."""
    recipe: str
    """Name of the recipe."""
    cluster: str
    """Name of the profile."""
    scheduler: Literal["slurm", "local"]
    """Who runs it."""
    point: dict[str, JsonValue] = Field(default_factory=dict)
    """This run's values of the swept fields."""
    sweep_id: str | None = None
    """Identity of the sweep that the run belongs to."""
    attempts: list[Attempt] = Field(default_factory=list)
    """Every submission."""


class Progress(Record):
    """The heartbeat: how far a run is, rewritten whole every few seconds by rank 0."""

    phase: Literal["starting", "data", "model", "training", "evaluation", "saving", "done"]
    """What the run is doing."""
    updated_at: float
    """Unix time in seconds of this heartbeat."""
    started_at: float
    """Unix time at which the ranks started."""
    job_id: str = ""
    """Attempt that wrote it."""
    node: str = ""
    """Node of rank 0."""
    step: int = 0
    """Optimizer steps done."""
    total_steps: int = 0
    """Optimizer steps in all."""
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


class Measured(Record):
    """What a run really took."""

    wall_s: float
    """Seconds from the start of the ranks to the end."""
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


class RunRecord(Record):
    """What came out of a run that completed; written last, so that its presence means success."""

    run_id: str
    """Identity by content."""
    recipe: str
    """Name of the recipe."""
    finished_at: float
    """Unix time in seconds."""
    job_id: str = ""
    """Attempt that wrote it."""
    split: str = ""
    """Split that the metrics are of."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """Metric to value, after training."""
    metrics_before: dict[str, float] = Field(default_factory=dict)
    """Metric to value before training, where the recipe asked for it."""
    examples: dict[str, int] = Field(default_factory=dict)
    """Examples of each split."""
    notes: list[str] = Field(default_factory=list)
    """What the reader of the number should know (rows dropped, texts cut)."""
    parameters: ParameterCount | None = None
    """Counted on the model that was trained."""
    measured: Measured | None = None
    """What it took."""
    predicted_memory_bytes: int | None = None
    """The plan's peak per rank."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Versions of what computed the number."""
