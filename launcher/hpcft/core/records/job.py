"""Job: every submission of a run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, JsonValue

from hpcft.core.records.base import AnyPath, JobId, Name, StoredPart, StoredRecord


class Fingerprints(StoredRecord):
    """Fingerprints of a run's inputs at the time of submission."""

    files: dict[str, str] = Field(default_factory=dict)
    """Hash of the local files, or commit on the hub, by dotted field of the recipe."""
    are_whole: bool = False
    """Whether all content was hashed; hpcft 0.1 hashed parts of model files over 64 MiB."""


class Attempt(StoredPart):
    """One submission of a run."""

    job_id: JobId | None
    """Slurm's job id (`123`, or `123_4` in an array), or the process id of the local controller;
    None until the scheduler has given one."""
    token: str
    """Comment of the job, by which a later command finds a job whose id was not saved."""
    array_index: int | None = None
    """Index in the job array; None outside an array."""
    submitted_at: float
    """Unix time of the submission, in seconds."""
    logs: AnyPath
    """Folder of the logs, which submitit writes."""
    host: str
    """Machine that submitted; the state of a local process is known only there."""
    slurm_cluster: str | None = None
    """Slurm's name of the cluster that the job was submitted to; None without Slurm, or if it was
    not known. Another cluster may have another job with the same id."""
    process_started: float | None = None
    """Start time of the local controller; a later process with the same id has another one."""


class Job(StoredRecord):
    """The submissions of a run, the latest last."""

    run_id: str
    """Run id: a hash of the run's content."""
    recipe: Name
    """Name of the recipe."""
    cluster: Name
    """Name of the cluster profile."""
    scheduler: Literal["slurm", "local"]
    """Scheduler that runs it."""
    point: dict[str, JsonValue] = Field(default_factory=dict)
    """Values of the swept fields in this run."""
    sweep_id: str | None = None
    """Id of the sweep that the run was submitted in; None outside a sweep."""
    attempts: list[Attempt] = Field(default_factory=list)
    """Every submission, the latest last."""
