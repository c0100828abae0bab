"""Entry point of every rank: `start_rank` calls `start`, as do the pickles of hpcft 0.1."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from hpcft.core.errors import StoreError
from hpcft.core.files import check_private, open_file, read_record_if_exists
from hpcft.core.paths import RunPaths
from hpcft.core.records import Job
from hpcft.scheduler import slurm_job


def start(run_folder: str) -> str:
    """Supervises one rank of the run; its result is in the run folder, not in what this returns.

    Raises:
        StoreError: others may write to the run folder or replace it, so that nothing is read.
    """
    check_private(Path(run_folder))
    if is_superseded(RunPaths(Path(run_folder))):
        sys.stdout.write("hpcft: another job runs this run by now, so this job ends\n")
    else:
        # Imported here, because the batch script's requeue imports this module without it.
        from hpcft.training.supervision import supervisor

        supervisor.main(run_folder)
    return run_folder


def submitted_run(runs_file: Path, digest: str, index: int) -> Path:
    """Returns the run folder of this job, from the list that was written at the submission.

    Args:
        runs_file: JSON list with the run folder of each element of the job array.
        digest: SHA-256 of that file; empty for jobs of hpcft 0.1, whose scripts hold none.
        index: the element.

    Raises:
        StoreError: others may write to the file's folder or replace it, or the file has changed.
    """
    check_private(runs_file.parent)
    try:
        with open_file(runs_file) as stream:
            text = stream.read()
    except OSError as error:
        raise StoreError(f"{runs_file}: cannot be read: {error.strerror}") from None
    if digest and hashlib.sha256(text).hexdigest() != digest:
        raise StoreError(
            f"{runs_file}: is not the list of runs that was submitted: hpcft cancel the job, find "
            "out who has changed the file, and submit the run again"
        )
    return Path(json.loads(text)[index])


def is_superseded(paths: RunPaths) -> bool:
    """Returns whether another job runs the run than this one.

    If sbatch timed out, a busy controller may queue its job later, when the run has another one.
    """
    job = read_record_if_exists(paths.job, Job)
    if job is None or job.scheduler != "slurm" or not job.attempts:
        return False
    return job.attempts[-1].job_id not in (None, slurm_job.current_job_id())
