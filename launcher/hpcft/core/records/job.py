"""Job: where a run was submitted, attempt by attempt."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, JsonValue

from hpcft.core.records.base import AnyPath, JobId, Name, StoredPart, StoredRecord


class Fingerprints(StoredRecord):
    """What the inputs of a run were when it was submitted."""

    files: dict[str, str] = Field(default_factory=dict)
    """Dotted field of the recipe to the hash of local files, or the commit on the hub."""


class Attempt(StoredPart):
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


class Job(StoredRecord):
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
