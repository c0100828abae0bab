"""Resubmits a run as another job, from one of the nodes on which its current job ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from hpcft.core import attempts, files
from hpcft.core.errors import ClusterError, StoreError
from hpcft.core.paths import RunPaths
from hpcft.core.records import Attempt, Job, Plan
from hpcft.recovery import log
from hpcft.recovery.run import Run
from hpcft.scheduler import scheduler_of
from hpcft.scheduler.protocol import JobRequest

LOCK_TIMEOUT_S = 120.0
"""Seconds for which a job waits, with its nodes, for a command that submits."""


def resubmit(run: Run, plan: Plan, job_id: str) -> str:
    """Submits another job for the run, once; returns its id.

    If an earlier call was interrupted, this one finishes it: a job that was queued already is found
    by its token, and never queued a second time.

    Args:
        run: the run; none of its ranks trains.
        plan: plan of the new job.
        job_id: the job that runs here.

    Raises:
        Refused: Slurm refuses the job.
        ClusterError: Slurm cannot be reached from this node, or another command keeps the lock.
    """
    paths, scheduler = run.paths, scheduler_of(run.cluster)
    with _locked(paths.folder.parents[1]):
        job = run.read_job()
        last = job.attempts[-1]
        last_id = last.job_id or scheduler.find_jobs([last])[0]
        if last_id and last_id != job_id:
            attempts.record_attempt(paths, job, last.model_copy(update={"job_id": last_id}))
            return last_id
        number = len(job.attempts) if last_id else len(job.attempts) - 1
        token = attempts.attempt_token(job.run_id, number, paths.folder)
        request = JobRequest(
            cluster=run.cluster,
            plan=plan,
            name=job.recipe,
            token=token,
            runs=[paths.folder],
            logs=paths.logs,
            exclude=log.excluded_nodes(run.read_recoveries()),
        )
        scheduler.check(request)
        attempt = attempts.new_attempt(token, paths.logs, slurm_cluster=scheduler.cluster_name())
        return _submit(run, job, attempt, request)


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Holds the lock of the runs folder; does not wait for long, since the job holds its nodes.

    Raises:
        ClusterError: another command keeps the lock.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.lock_folder(root, LOCK_TIMEOUT_S))
        except StoreError as error:
            raise ClusterError(str(error)) from None
        yield


def _submit(run: Run, job: Job, attempt: Attempt, request: JobRequest) -> str:
    """Writes what the new job needs, and submits it; restores the folder if that fails."""
    paths = run.paths
    recoveries = run.read_recoveries()
    number = recoveries[-1].number if recoveries else 0
    plan = request.plan.model_copy(update={"recovery_number": number})
    before, before_current = files.read_record(paths.plan, Plan), run.read_plan()
    files.create_folder(paths.logs)
    attempts.record_attempt(paths, job, attempt)
    attempts.archive(paths, [paths.progress, paths.errors, paths.plan])
    files.write_record(paths.plan, plan)
    files.write_record(paths.current_plan, plan)
    try:
        (submission,) = scheduler_of(run.cluster).submit(request)
    except BaseException:
        files.write_record(paths.job, job)
        files.write_record(paths.plan, before)
        files.write_record(paths.current_plan, before_current)
        raise
    job_id = submission.job_id
    attempts.record_attempt(paths, job, attempt.model_copy(update={"job_id": job_id}))
    if plan.ds_config is not None:
        files.write_json(paths.ds_config, plan.ds_config)
    return job_id


def is_resubmitted(paths: RunPaths, job_id: str) -> bool:
    """Returns whether the run has another job after this one."""
    last = files.read_record(paths.job, Job).attempts[-1]
    return last.job_id not in (None, job_id)
