"""Job, Progress and RunRecord: where a run is, how far, and what came out."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, JsonValue

from hpcft.core.records.base import (AnyPath, JobId, Name, Positive, PositiveInt, Record)
from hpcft.core.records.plan import Layout, ParameterCount


class Fingerprints(Record):
    """What the inputs of a run were when it was submitted."""

    files: dict[str, str] = Field(default_factory=dict)
    """Dotted field of the recipe to the hash of local files, or the commit on the hub."""


class Attempt(Record):
    """One submission of a run."""

    job_id: JobId | None
    """Slurm's id (`123`, `123_4` in an array) or the local controller's process id; None until
    known."""
    token: str
    """Written before sbatch and sent as the job's comment: lets a later start adopt the job."""
    array_index: int | None = None
    """Element of the job array."""
    submitted_at: float
    """Unix time in seconds."""
    logs: AnyPath
    """Folder of submitit's logs."""
    host: str
    """Machine that submitted; a local process can only be asked about there."""
    process_started: float | None = None
    """Start time of the local controller, so that a recycled process id is not mistaken for it."""


class Job(Record):
    """Where a run was submitted: every attempt, the latest last."""

    run_id: str
    """Identity by content."""
    recipe: Name
    """Name of the recipe."""
    cluster: Name
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
    """Unix time at which the ranks started, for the last time."""
    ranks: int = 1
    """As many."""
    earlier_s: float = 0.0
    """Seconds that they ran in earlier starts."""
    earlier_rank_s: float = 0.0
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
        return self.earlier_s + last_s, self.earlier_rank_s + last_s * self.ranks


class RankError(Record):
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


class Recovery(Record):
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
    how: Literal["in-process", "restarted", "requeued", "queued anew", "resumed"]
    """Whether the step was done again where it stood, all ranks started again within their
    allocation, Slurm started the same job again, another job took over, or a person had it go on.
    """
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


class PhasePeaks(Record):
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


class Measured(Record):
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


class Prediction(Record):
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


class Confusion(Record):
    """Which labels a model takes for which."""

    labels: list[str]
    """In the order of rows and columns."""
    counts: list[list[int]]
    """Examples by the label that they have (a row) and the one that they were given (a column); a
    last column without a label, if there is one, counts those that were given none."""


class RunRecord(Record):
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
    measured: Measured | None = None
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
    def rungs(self) -> list[Recovery]:
        """Steps down the ladder that it needed; none where the plan held."""
        return [recovery for recovery in self.recoveries if recovery.change]
