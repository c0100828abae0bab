"""Records the attempts at a run in job.json, and archives what earlier attempts wrote."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Iterable
from pathlib import Path

from hpcft.core.files import write_record
from hpcft.core.paths import RunPaths
from hpcft.core.records import Attempt, Job


def attempt_token(name: str, number: int, folder: Path) -> str:
    """Returns the token of an attempt, which Slurm shows as the job's comment.

    Args:
        name: run id, or id of the sweep.
        number: number of earlier attempts.
        folder: run folder, of a sweep the first one; so tokens of two runs folders differ.
    """
    return f"hpcft-{name}-{number}-{zlib.crc32(str(folder).encode()):08x}"


def new_attempt(
    token: str,
    logs: Path,
    *,
    job_id: str | None = None,
    array_index: int | None = None,
    slurm_cluster: str | None = None,
    process_started: float | None = None,
) -> Attempt:
    """Returns an attempt submitted now from this machine; arguments as in the record."""
    return Attempt(
        job_id=job_id,
        token=token,
        array_index=array_index,
        slurm_cluster=slurm_cluster,
        submitted_at=time.time(),
        logs=str(logs),
        host=os.uname().nodename,
        process_started=process_started,
    )


def record_attempt(paths: RunPaths, job: Job, attempt: Attempt) -> None:
    """Writes an attempt into job.json; replaces the attempt that has the same token."""
    others = [other for other in job.attempts if other.token != attempt.token]
    write_record(paths.job, job.model_copy(update={"attempts": [*others, attempt]}))


def archive(paths: RunPaths, files: Iterable[Path]) -> None:
    """Moves files of earlier attempts into `previous/<number>/`, so that nothing is lost."""
    present = [file for file in files if os.path.lexists(file)]
    if not present:
        return
    numbers = [int(p.name) for p in paths.previous.glob("*") if p.name.isdecimal()]
    target = paths.previous / str(max(numbers, default=-1) + 1)
    target.mkdir(mode=0o700, parents=True)
    for file in present:
        file.rename(target / file.name)
