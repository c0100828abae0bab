"""Resubmits a run as another job, from one of the nodes on which its current job ends."""

from __future__ import annotations

from hpcft.core import attempts, files
from hpcft.core.paths import RunPaths
from hpcft.core.records import Attempt, Job, Plan
from hpcft.recovery import log
from hpcft.recovery.run import Run
from hpcft.scheduler import scheduler_of
from hpcft.scheduler.protocol import Entry, JobRequest


def resubmit(run: Run, plan: Plan, job_id: str, entry: Entry) -> str:
    """Submits another job for the run, once; returns its id.

    If an earlier call was interrupted, this one finishes it: a job that was queued already is found
    by its token, and never queued a second time.

    Args:
        run: the run; none of its ranks trains.
        plan: plan of the new job.
        job_id: the job that runs here.
        entry: function that the ranks of the new job start with (`training.entry.start`).

    Raises:
        Refused: Slurm refuses the job.
        ClusterError: Slurm cannot be reached from this node.
    """
    paths, scheduler = run.paths, scheduler_of(run.cluster)
    with files.lock_folder(paths.folder.parents[1]):
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
            entry=entry,
            exclude=log.excluded_nodes(run.read_recoveries()),
        )
        scheduler.check(request)
        return _submit(run, job, attempts.new_attempt(token, paths.logs), request)


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
