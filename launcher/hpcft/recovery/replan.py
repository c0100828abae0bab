"""Plans a run on more nodes: the last fallback, which needs another job.

A run does so by itself only if its recipe has `resources.nodes: auto`, and within its profile's
limits.
"""

from __future__ import annotations

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.errors import DoesNotFit
from hpcft.core.records import Cluster, OomCaps, Plan
from hpcft.planning import model_facts, oom_fallback, planner
from hpcft.planning.dataset_size import count_examples
from hpcft.planning.inputs import PlanInputs


def plan_on_more_nodes(before: Plan, recipe: FullRecipe, cluster: Cluster) -> Plan | None:
    """Plans the run on the next larger number of nodes on which it fits.

    Args:
        before: the plan that ran last; no other fallback is left for it.
        recipe: the run's recipe.
        cluster: the run's profile.

    Returns:
        A plan whose micro-batch and other memory settings are no larger than those of `before`;
        None if the recipe fixes the nodes, or the cluster has no more.
    """
    if cluster.scheduler != "slurm" or recipe.resources.nodes != "auto":
        return None
    layout = before.layout
    while nodes := oom_fallback.next_node_count(layout, recipe, cluster):
        try:
            return _plan_on(nodes, before, recipe, cluster)
        except DoesNotFit:
            layout = layout.model_copy(update={"nodes": nodes})
    return None


def _plan_on(nodes: int, before: Plan, recipe: FullRecipe, cluster: Cluster) -> Plan:
    """Plans the run on so many nodes, within the memory settings of what ran out of memory."""
    layout = before.layout
    cap = OomCaps(
        per_device_train_batch_size=layout.per_device_train_batch_size,
        gradient_checkpointing=layout.gradient_checkpointing,
        loss_chunks=layout.loss_chunks,
        nodes=nodes,
    )
    oom_caps = {**cluster.calibration.oom_caps, recipe.name: cap}
    calibration = cluster.calibration.model_copy(update={"oom_caps": oom_caps})
    resources = {
        "nodes": nodes,
        "zero_stage": layout.zero_stage or "auto",
        "offload_optimizer": layout.offload_optimizer,
        "offload_param": layout.offload_param,
    }
    inputs = PlanInputs(
        oom_fallback.with_auto_batch(recipe, **resources),
        cluster.model_copy(update={"calibration": calibration}),
        before.facts,
        load_bytes=model_facts.largest_weight_file_bytes(recipe.model, before.facts),
        examples=count_examples(recipe.task.data),
    )
    plan = planner.make_plan(inputs, brief=True)
    # The prediction was too low once, so the new job requests no less memory than the old one.
    return plan.model_copy(
        update={
            "mem_mib": max(plan.mem_mib, before.mem_mib),
            "per_device_eval_batch_size": min(
                plan.per_device_eval_batch_size, before.per_device_eval_batch_size
            ),
        }
    )
