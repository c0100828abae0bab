"""What submitit starts on every rank: importable by name, takes only the run folder's path."""

from __future__ import annotations

import sys
from pathlib import Path

from hpcft.core.files import read_record_if_exists
from hpcft.core.paths import RunPaths
from hpcft.core.records import Job
from hpcft.scheduler import slurm


def start(run_folder: str) -> str:
    """Watches over one rank of the run; the result is in the run folder, not returned."""
    if is_superseded(RunPaths(Path(run_folder))):
        sys.stdout.write("hpcft: the run has another job by now; this one ends\n")
    else:
        # Here, because the login node imports this module for its name alone.
        from hpcft.training.supervision import supervisor

        supervisor.main(run_folder, start)
    return run_folder


def is_superseded(paths: RunPaths) -> bool:
    """Whether the run has another job than this one.

    Of an sbatch that timed out nobody may have seen the job, until a busy controller queued it.
    """
    job = read_record_if_exists(paths.job, Job)
    if job is None or job.scheduler != "slurm" or not job.attempts:
        return False
    return job.attempts[-1].job_id not in (None, slurm.current_job_id())
