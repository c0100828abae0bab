"""The attempts at a run: each is named in job.json by a token before it is queued."""

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
    """Names an attempt at what is in a run folder.

    Args:
        name: of the run, or of a sweep.
        number: of earlier attempts.
        folder: run folder, a sweep's first; runs folders do not know of each other.
    """
    return f"hpcft-{name}-{number}-{zlib.crc32(str(folder).encode()):08x}"


def new_attempt(
    job_id: str | None,
    token: str,
    logs: Path,
    array_index: int | None = None,
    process_started: float | None = None,
) -> Attempt:
    """An attempt of now and of this machine; arguments as of the record."""
    return Attempt(
        job_id=job_id,
        token=token,
        array_index=array_index,
        submitted_at=time.time(),
        logs=str(logs),
        host=os.uname().nodename,
        process_started=process_started,
    )


def record_attempt(paths: RunPaths, job: Job, made: Attempt) -> None:
    """Writes an attempt into job.json: first with its token, then again with its job id."""
    others = [a for a in job.attempts if a.token != made.token]
    write_record(paths.job, job.model_copy(update={"attempts": [*others, made]}))


def archive(paths: RunPaths, written: Iterable[Path]) -> None:
    """Moves what an earlier attempt wrote into `earlier/<number>/`, so that nothing is lost."""
    stale = [path for path in written if path.exists()]
    if stale:
        aside = paths.previous / str(sum(1 for _ in paths.previous.glob("*")))
        aside.mkdir(mode=0o700, parents=True)
        for path in stale:
            path.rename(aside / path.name)
