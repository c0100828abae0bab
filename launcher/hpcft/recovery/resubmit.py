"""Another job for a run, queued from one of the nodes on which it has ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hpcft.core import attempts, files
from hpcft.core.paths import RunPaths
from hpcft.core.records import Attempt, Cluster, Job, Plan
from hpcft.recovery import log
from hpcft.scheduler import slurm

Entry = Callable[[str], object]
"""What each rank of a job starts with: importable, takes the run folder (`training.entry.start`)."""


def resubmit(paths: RunPaths, plan: Plan, cluster: Cluster, job_id: str, entry: Entry) -> str:
    """Queues the run anew from one of its nodes, once; the id of the job.

    An attempt that was interrupted is taken up where it stands: a job that was queued is found by
    its token, and never queued a second time.

    Args:
        paths: the run; none of its ranks trains.
        plan: of the new job.
        cluster: the run's profile.
        job_id: the job that runs here.
        entry: what the ranks of the new job start with.

    Raises:
        Refused: Slurm will not take it.
        ClusterError: it cannot be asked from here.
    """
    with files.lock_folder(paths.folder.parents[1]), slurm.without_job_env():
        job = files.read_record(paths.job, Job)
        last = job.attempts[-1]
        known = last.job_id or slurm.find_by_token(last.token, last.array_index)
        if known and known != job_id:
            attempts.record_attempt(paths, job, last.model_copy(update={"job_id": known}))
            return known
        number = len(job.attempts) if known else len(job.attempts) - 1
        made = attempts.new_attempt(
            None, attempts.attempt_token(job.run_id, number, paths.folder), paths.logs
        )
        away_from = log.excluded_nodes(log.read_recoveries(paths))
        options = slurm.job_parameters(cluster, plan, job.recipe, made.token, away_from)
        slurm.check_script(slurm.sbatch_script(paths.logs, options, cluster, 1))
        return _submit(paths, plan, cluster, job, made, options, entry)


def _submit(
    paths: RunPaths,
    plan: Plan,
    cluster: Cluster,
    job: Job,
    made: Attempt,
    options: dict[str, Any],
    entry: Entry,
) -> str:
    """Writes what the new job needs, and submits it; all stays as it was if that fails."""
    before = files.read_record(paths.plan, Plan)
    files.create_folder(paths.logs)
    attempts.record_attempt(paths, job, made)
    attempts.archive(paths, [paths.progress, paths.errors, paths.plan])
    files.write_record(paths.plan, plan)
    try:
        (job_id,) = slurm.submit(paths.logs, options, cluster, entry, [paths.folder])
    except BaseException:
        files.write_record(paths.job, job)
        files.write_record(paths.plan, before)
        raise
    attempts.record_attempt(paths, job, made.model_copy(update={"job_id": job_id}))
    if plan.ds_config is not None:
        files.write_json(paths.ds_config, plan.ds_config)
    return job_id


def is_resubmitted(paths: RunPaths, job_id: str) -> bool:
    """Whether the run has another job after this one."""
    last = files.read_record(paths.job, Job).attempts[-1]
    return last.job_id not in (None, job_id)
