"""What becomes of a run whose ranks have ended too early: the batch script asks it after srun.

It stands outside of the ranks, so that it is there even if all of them were killed, and it is the
one place that has a job start again. Where Slurm itself ends a job (a node that fails, preemption
without notice) it also starts it again by itself, and the ranks find their checkpoint.

    python -m hpcft.training.requeue RUNS_FILE
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path

from hpcft.core.errors import ClusterError, HpcftError
from hpcft.core.files import check_private, read_record
from hpcft.core.paths import RunPaths
from hpcft.core.records import Cluster, Job, Plan
from hpcft.planning import caps, oom_fallback
from hpcft.recovery import limits, resubmit
from hpcft.recovery.diagnosis import Failure, RankError, explain_failure, write_rank_error
from hpcft.recovery.log import (
    append_recovery,
    current_plan,
    is_superseded_start,
    read_recoveries,
    remove_last_recovery,
    saved_step,
)
from hpcft.scheduler import slurm
from hpcft.staging.staged_inputs import load_run_recipe
from hpcft.training import entry

log = logging.getLogger("hpcft.training.requeue")


def main(runs_file: str) -> None:
    """Has the run of this job start again, if that is of use; says what it does."""
    folders = json.loads(Path(runs_file).read_text())
    folder = folders[int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))]
    paths = RunPaths(Path(folder))
    logging.basicConfig(stream=sys.stdout, format="%(asctime)s %(name)s: %(message)s")
    log.setLevel(logging.INFO)
    try:
        check_private(paths.folder)
        log.info("%s", decide_requeue(paths, slurm.current_job_id(), slurm.restart_count()))
    except HpcftError as error:
        log.error("it does not start again: %s", error)


def decide_requeue(paths: RunPaths, job_id: str, restart: int) -> str:
    """Has a run start again where its failure allows it; what was done, in words.

    Args:
        paths: the run; none of its ranks trains.
        job_id: the job that runs here.
        restart: how often Slurm has started it again before.
    """
    if paths.result.exists():
        return "the run is complete"
    job = read_record(paths.job, Job)
    last = job.attempts[-1]
    if last.job_id not in (None, job_id):
        return f"the run goes on as job {last.job_id}"
    if is_superseded_start(paths, job_id, restart):
        return "Slurm has started the job again already"
    state = slurm.job_states([job_id])[job_id]
    if not state.is_live:
        return f"the job is over: {state.state}"
    taken = read_recoveries(paths)
    failure = explain_failure(paths, last.model_copy(update={"job_id": job_id}), state, taken)
    who = _who(failure, job_id)
    step = saved_step(paths)
    recipe, cluster = load_run_recipe(paths), read_record(paths.cluster, Cluster)
    plan = current_plan(paths, recipe, cluster)
    more = oom_fallback.double_host_memory(plan) if failure.name == caps.HOST_OOM else None
    if more:
        return _elsewhere(paths, plan, more, who, failure, step)
    if failure.policy not in ("requeue", "exclude"):
        return f"it does not start again: {failure}"
    if obstacle := limits.restart_limit_reason(taken, failure.name, step):
        if obstacle in failure.sentence:  # the ranks have refused for the same reason
            return f"it does not start again: {failure}"
        message = f"{failure.sentence}; {obstacle}"
        update = {"failure": "stuck", "message": message, "next_step": failure.next_step}
        write_rank_error(paths, who.model_copy(update=update))
        return f"it does not start again: {message}"
    if failure.policy == "exclude":
        return _elsewhere(paths, plan, plan, who, failure, step)
    return _here(paths, plan, who, failure, step, restart)


def _here(
    paths: RunPaths, plan: Plan, who: RankError, failure: Failure, step: int, restart: int
) -> str:
    """Has Slurm start the same job again; where it will not, another job takes over."""
    recipe, cluster = load_run_recipe(paths), read_record(paths.cluster, Cluster)
    number = len(read_recoveries(paths)) + 1
    append_recovery(
        paths, plan, plan, number=number, action="requeue", who=who, cause=failure.name,
        step=step, restart=restart + 1,
    )  # fmt: skip
    try:
        slurm.requeue(who.job_id)
    except ClusterError as error:
        remove_last_recovery(paths, read_recoveries(paths)[-1], recipe, cluster)
        log.warning("the job cannot be requeued (%s)", error)
        return _elsewhere(paths, plan, plan, who, failure, step)
    return f"requeued at step {step}: {failure.sentence}"


def _elsewhere(
    paths: RunPaths, before: Plan, after: Plan, who: RankError, failure: Failure, step: int
) -> str:
    """Queues the run as another job, away from the nodes that are to blame."""
    recipe, cluster = load_run_recipe(paths), read_record(paths.cluster, Cluster)
    taken = read_recoveries(paths)
    blamed = [failure.node] if failure.policy == "exclude" and failure.node else []
    append_recovery(
        paths, before, after, number=len(taken) + 1, action="resubmit", who=who,
        cause=failure.name, step=step, excluded=blamed,
    )  # fmt: skip
    try:
        job_id = resubmit.resubmit(paths, after, cluster, who.job_id, entry.start)
    except (slurm.Refused, ClusterError) as error:
        remove_last_recovery(paths, read_recoveries(paths)[-1], recipe, cluster)
        return f"it does not start again: {failure}; it cannot be queued anew: {error}"
    away = f", away from {', '.join(blamed)}" if blamed else ""
    change = read_recoveries(paths)[-1].change
    how = f"{away} with {change}" if change else away
    return f"queued anew as job {job_id}{how}, at step {step}: {failure.sentence}"


def _who(failure: Failure, job_id: str) -> RankError:
    """What went wrong, as the rank that it began on would say it."""
    return RankError(
        rank=failure.rank or 0,
        node=failure.node or slurm.current_node(),
        at=time.time(),
        kind="Ended",
        message=failure.evidence or failure.sentence,
        job_id=job_id,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
