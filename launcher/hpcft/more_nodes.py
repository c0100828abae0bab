"""The ladder's last rung: the same run on more nodes, which takes another job.

A run does so by itself where its recipe leaves the number of nodes to the plan, and only as far as
its profile allows. A checkpoint has a part for each rank, so that the run begins anew.
"""

from __future__ import annotations

from typing import Any

from hpcft import attempts, ladder, store
from hpcft import plan as planner
from hpcft.cluster import rank_entry, slurm
from hpcft.errors import DoesNotFit
from hpcft.examples import known_examples
from hpcft.memory import parameters
from hpcft.paths import RunPaths
from hpcft.recipe import FullRecipe
from hpcft.records import Attempt, Cluster, Job, Lowered, Plan


def planned(before: Plan, recipe: FullRecipe, cluster: Cluster) -> Plan | None:
    """The plan of the run on the next number of nodes that holds it.

    Args:
        before: what ran last, at the end of the ladder.
        recipe: the run's recipe.
        cluster: the run's profile.

    Returns:
        A plan that is nowhere wider than what ran; None where more nodes are not to be had, or not
        for the run to take.
    """
    if cluster.scheduler != "slurm" or recipe.resources.nodes != "auto":
        return None
    layout = before.layout
    while nodes := ladder.more_nodes(layout, recipe, cluster):
        try:
            return _on(nodes, before, recipe, cluster)
        except DoesNotFit:
            layout = layout.model_copy(update={"nodes": nodes})
    return None


def _on(nodes: int, before: Plan, recipe: FullRecipe, cluster: Cluster) -> Plan:
    """The planner's choice on so many nodes, below what ran out of memory."""
    layout = before.layout
    cap = Lowered(
        per_device_train_batch_size=layout.per_device_train_batch_size,
        gradient_checkpointing=layout.gradient_checkpointing,
        loss_chunks=layout.loss_chunks,
        nodes=nodes,
    )
    known = cluster.calibration
    learnt = known.model_copy(update={"lowered": {**known.lowered, recipe.name: cap}})
    held = {
        "nodes": nodes,
        "zero_stage": layout.zero_stage or "auto",
        "offload_optimizer": layout.offload_optimizer,
        "offload_param": layout.offload_param,
    }
    plan = planner.make(
        ladder.freed(recipe, **held),
        cluster.model_copy(update={"calibration": learnt}),
        before.facts,
        load_bytes=parameters.largest_weight_file_bytes(recipe.model, before.facts),
        examples=known_examples(recipe.task.data),
        brief=True,
    )
    # The prediction was too low once: what was asked for then is not lowered.
    least = {
        "mem_mib": max(plan.mem_mib, before.mem_mib),
        "per_device_eval_batch_size": min(
            plan.per_device_eval_batch_size, before.per_device_eval_batch_size
        ),
    }
    return plan.model_copy(update=least)


def queue(paths: RunPaths, plan: Plan, cluster: Cluster, job_id: str) -> str:
    """Queues the run anew from one of its nodes, once; the id of the job.

    An attempt that was interrupted is taken up where it stands: a job that was queued is found by
    its token, and never queued a second time.

    Args:
        paths: the run; none of its ranks trains.
        plan: from `planned`.
        cluster: the run's profile.
        job_id: the job that runs here.

    Raises:
        Refused: Slurm will not take it.
        ClusterError: it cannot be asked from here.
    """
    with store.locked(paths.folder.parents[1]), slurm.outside_of_its_job():
        job = store.read(paths.job, Job)
        last = job.attempts[-1]
        known = last.job_id or slurm.find_by_token(last.token, last.array_index)
        if known and known != job_id:
            attempts.note(paths, job, last.model_copy(update={"job_id": known}))
            return known
        number = len(job.attempts) if known else len(job.attempts) - 1
        made = attempts.attempt(None, attempts.token(job.run_id, number, paths.folder), paths.logs)
        options = slurm.parameters(cluster, plan, job.recipe, made.token)
        slurm.check(slurm.sbatch_script(paths.logs, options, cluster, 1))
        return _submit(paths, plan, cluster, job, made, options)


def _submit(
    paths: RunPaths,
    plan: Plan,
    cluster: Cluster,
    job: Job,
    made: Attempt,
    options: dict[str, Any],
) -> str:
    """Writes what the new job needs, and submits it; all stays as it was if that fails."""
    before = store.read(paths.plan, Plan)
    store.create_folder(paths.logs)
    attempts.note(paths, job, made)
    attempts.set_aside(paths, [paths.progress, paths.errors, paths.checkpoints, paths.plan])
    store.write(paths.plan, plan)
    try:
        (job_id,) = slurm.submit(paths.logs, options, cluster, rank_entry.start, [paths.folder])
    except BaseException:
        store.write(paths.job, job)
        store.write(paths.plan, before)
        raise
    attempts.note(paths, job, made.model_copy(update={"job_id": job_id}))
    if plan.ds_config is not None:
        store.write_json(paths.ds_config, plan.ds_config)
    return job_id


def is_queued(paths: RunPaths, job_id: str) -> bool:
    """Whether the run has another job after this one."""
    last = store.read(paths.job, Job).attempts[-1]
    return last.job_id not in (None, job_id)
