"""The ladder's last rung: the same run on more nodes, which takes another job.

A run does so by itself where its recipe leaves the number of nodes to the plan, and only as far as
its profile allows.
"""

from __future__ import annotations

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.errors import DoesNotFit
from hpcft.core.records import Cluster, OomCaps, Plan
from hpcft.planning import model_facts, oom_fallback, planner
from hpcft.planning.dataset_size import count_examples


def plan_on_more_nodes(before: Plan, recipe: FullRecipe, cluster: Cluster) -> Plan | None:
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
    while nodes := oom_fallback.next_node_count(layout, recipe, cluster):
        try:
            return _on(nodes, before, recipe, cluster)
        except DoesNotFit:
            layout = layout.model_copy(update={"nodes": nodes})
    return None


def _on(nodes: int, before: Plan, recipe: FullRecipe, cluster: Cluster) -> Plan:
    """The planner's choice on so many nodes, below what ran out of memory."""
    layout = before.layout
    cap = OomCaps(
        per_device_train_batch_size=layout.per_device_train_batch_size,
        gradient_checkpointing=layout.gradient_checkpointing,
        loss_chunks=layout.loss_chunks,
        nodes=nodes,
    )
    known = cluster.calibration
    learnt = known.model_copy(update={"oom_caps": {**known.oom_caps, recipe.name: cap}})
    held = {
        "nodes": nodes,
        "zero_stage": layout.zero_stage or "auto",
        "offload_optimizer": layout.offload_optimizer,
        "offload_param": layout.offload_param,
    }
    plan = planner.make_plan(
        oom_fallback.with_auto_batch(recipe, **held),
        cluster.model_copy(update={"calibration": learnt}),
        before.facts,
        load_bytes=model_facts.largest_weight_file_bytes(recipe.model, before.facts),
        examples=count_examples(recipe.task.data),
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
