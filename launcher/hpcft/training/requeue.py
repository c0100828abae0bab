"""Decides after srun whether a run that has ended too early is requeued or resubmitted.

It runs in the batch script, outside of the ranks, so that it runs even if all ranks were killed. If
Slurm itself ends a job (a node fails, preemption without notice), Slurm also restarts it, and the
ranks find their checkpoint.

    python -m hpcft.training.requeue RUNS_FILE DIGEST
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path

from hpcft.core.errors import ClusterError, HpcftError
from hpcft.core.rank_errors import write_rank_error
from hpcft.core.records import Plan, RankError
from hpcft.planning import caps, oom_fallback
from hpcft.recovery import limits, resubmit
from hpcft.recovery.diagnosis import Failure, explain_failure
from hpcft.recovery.log import append_recovery, is_superseded_start
from hpcft.recovery.retry import Retry
from hpcft.recovery.run import Run
from hpcft.scheduler import slurm_commands, slurm_job
from hpcft.scheduler.job_state import UNKNOWN, JobState
from hpcft.scheduler.protocol import Refused
from hpcft.training import entry

log = logging.getLogger("hpcft.training.requeue")


def main(runs_file: str, digest: str = "") -> None:
    """Requeues or resubmits the run of this job, if that may help; logs what it does.

    Args:
        runs_file: JSON list with the run folder of each element of the job array.
        digest: SHA-256 of that file; empty for jobs of hpcft 0.1, whose scripts hold none.
    """
    logging.basicConfig(stream=sys.stdout, format="%(asctime)s %(name)s: %(message)s")
    log.setLevel(logging.INFO)
    try:
        index = int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))
        run = Run.open(entry.submitted_run(Path(runs_file), digest, index))
        log.info("%s", decide_requeue(run, slurm_job.current_job_id(), slurm_job.restart_count()))
    except HpcftError as error:
        log.error("not restarted: %s", error)


def decide_requeue(run: Run, job_id: str, restart: int) -> str:
    """Requeues or resubmits a run if its failure allows it; returns a sentence for the log.

    Args:
        run: the run; none of its ranks trains.
        job_id: the job that runs here.
        restart: how often Slurm has restarted the job before.
    """
    if run.has_result():
        return "the run is complete"
    last = run.read_job().attempts[-1]
    if last.job_id not in (None, job_id):
        return f"the run continues as job {last.job_id}"
    if is_superseded_start(run.paths, job_id, restart):
        return "Slurm has restarted the job already"
    retry = Retry()
    state = _state(job_id, retry)
    if state.is_over or state.unknown_to_slurm:
        return f"the job is over: {state.state}"
    recoveries = run.read_recoveries()
    attempt = last.model_copy(update={"job_id": job_id})
    failure = explain_failure(run.paths, attempt, state, recoveries)
    error = _as_rank_error(failure, job_id)
    step, plan = run.saved_step(), run.read_plan()
    with_more = oom_fallback.double_host_memory(plan) if failure.name == caps.HOST_OOM else None
    if with_more:
        return _resubmit(run, with_more, error, failure, step, retry)
    if failure.policy not in ("requeue", "exclude"):
        return f"not restarted: {failure}"
    if reason := limits.restart_limit_reason(recoveries, failure.name, step):
        if reason in failure.sentence:  # The supervisors gave up for the same reason.
            return f"not restarted: {failure}"
        message = f"{failure.sentence}; {reason}"
        is_interrupted = failure.name in limits.INTERRUPTIONS
        advice = limits.INTERRUPTED_ADVICE if is_interrupted else failure.next_step
        update = {"failure": "stuck", "message": message, "next_step": advice}
        write_rank_error(run.paths, error.model_copy(update=update))
        return f"not restarted: {message}"
    if failure.policy == "exclude":
        return _resubmit(run, plan, error, failure, step, retry)
    return _requeue(run, error, failure, step, restart, retry)


def _state(job_id: str, retry: Retry) -> JobState:
    """Returns the state of this job; UNKNOWN if the controller does not answer for minutes."""
    state = JobState(UNKNOWN)

    def ask() -> None:
        nonlocal state
        state = slurm_commands.job_states([job_id])[job_id]
        if state.state == UNKNOWN and not state.unknown_to_slurm:
            raise ClusterError(state.reason)

    with contextlib.suppress(ClusterError):
        retry(ask)
    return state


def _requeue(
    run: Run, error: RankError, failure: Failure, step: int, restart: int, retry: Retry
) -> str:
    """Requeues the job; resubmits the run as another job if Slurm refuses."""
    plan = run.read_plan()
    append_recovery(
        run.paths,
        plan,
        plan,
        number=len(run.read_recoveries()) + 1,
        action="requeue",
        error=error,
        cause=failure.name,
        step=step,
        restart=restart + 1,
    )
    try:
        retry(lambda: slurm_job.requeue(error.job_id))
    except ClusterError as refused:
        run.remove_last_recovery()
        log.warning("the job cannot be requeued (%s): resubmitting the run", refused)
        return _resubmit(run, plan, error, failure, step, retry, f"requeued ({refused}) or ")
    return f"requeued at step {step}: {failure.sentence}"


def _resubmit(
    run: Run,
    plan: Plan,
    error: RankError,
    failure: Failure,
    step: int,
    retry: Retry,
    failed_before: str = "",
) -> str:
    """Submits the run with a plan as another job, which excludes the node at fault."""
    excluded = [failure.node] if failure.policy == "exclude" and failure.node else []
    append_recovery(
        run.paths,
        run.read_plan(),
        plan,
        number=len(run.read_recoveries()) + 1,
        action="resubmit",
        error=error,
        cause=failure.name,
        step=step,
        excluded=excluded,
    )
    try:
        job_id = retry(lambda: resubmit.resubmit(run, plan, error.job_id))
    except (Refused, ClusterError) as refused:
        run.remove_last_recovery()
        reason = f"the run could not be {failed_before}resubmitted ({refused})"
        update = {"failure": "not_requeued", "message": f"{failure.sentence}; {reason}"}
        write_rank_error(run.paths, error.model_copy(update=update))
        return f"not restarted: {failure}; {reason}"
    without = f" without {', '.join(excluded)}" if excluded else ""
    change = run.read_recoveries()[-1].change
    with_change = f" with {change}" if change else ""
    return f"resubmitted as job {job_id}{without}{with_change}, at step {step}: {failure.sentence}"


def _as_rank_error(failure: Failure, job_id: str) -> RankError:
    """Returns the failure as an error record of the rank that failed first."""
    return RankError.now(
        failure.rank or 0,
        "Ended",
        failure.evidence or failure.sentence,
        node=failure.node,
        job_id=job_id,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
