"""Entry point of every rank: submitit imports `start` by name and passes the run folder's path."""

from __future__ import annotations

import sys
from pathlib import Path

from hpcft.core.files import read_record_if_exists
from hpcft.core.paths import RunPaths
from hpcft.core.records import Job
from hpcft.scheduler import slurm_job


def start(run_folder: str) -> str:
    """Supervises one rank of the run; its result is in the run folder, not in what this returns."""
    if is_superseded(RunPaths(Path(run_folder))):
        sys.stdout.write("hpcft: another job runs this run by now, so this job ends\n")
    else:
        # Imported here, because the login node imports this module only to name `start`.
        from hpcft.training.supervision import supervisor

        supervisor.main(run_folder, start)
    return run_folder


def is_superseded(paths: RunPaths) -> bool:
    """Returns whether another job runs the run than this one.

    If sbatch timed out, a busy controller may queue its job later, when the run has another one.
    """
    job = read_record_if_exists(paths.job, Job)
    if job is None or job.scheduler != "slurm" or not job.attempts:
        return False
    return job.attempts[-1].job_id not in (None, slurm_job.current_job_id())
