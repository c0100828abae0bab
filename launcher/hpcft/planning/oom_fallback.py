"""Chooses what a run that is out of memory changes next.

Every fallback keeps the global batch, and so the loss up to rounding. Fallbacks are layouts that
the planner may choose too, taken in the order of what they cost in speed. The last one, more nodes,
takes another job (`recovery.replan`).
"""

from __future__ import annotations

from typing import Literal

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.records import Cluster, Layout, Plan
from hpcft.core.units import MIB, format_bytes
from hpcft.planning.deepspeed_config import build_deepspeed_config
from hpcft.planning.inputs import PlanInputs
from hpcft.planning.layouts import allowed_layouts

Stage = Literal["states", "step", "evaluation"]
"""Stage in which memory ran out: creating weights and optimizer, a training step, or scoring."""


def next_fallback(plan: Plan, recipe: FullRecipe, cluster: Cluster, stage: Stage) -> Plan | None:
    """Returns the plan of the next fallback on the same ranks; None where none is left.

    Args:
        plan: the plan that runs now.
        recipe: the run's recipe. A micro-batch or checkpointing that it fixes is lowered all the
            same, for neither changes what is computed; sharding and offloading that it fixes stay.
        cluster: the run's profile.
        stage: the stage in which memory ran out.
    """
    eval_batch = plan.per_device_eval_batch_size
    if stage == "evaluation" and eval_batch > 1:
        half = eval_batch // 2
        return with_layout(plan, plan.layout, half, recipe=recipe, cluster=cluster)
    layout = next_layout(
        plan.layout,
        recipe,
        cluster,
        in_step=stage == "step",
        supports_chunked_loss=plan.facts.supports_chunked_loss,
    )
    if layout is None:
        return None
    if recipe.evaluation.per_device_eval_batch_size == "auto":
        # The planner chose a multiple of the micro-batch, and it stays the same multiple.
        before, now = (x.per_device_train_batch_size for x in (plan.layout, layout))
        eval_batch = max(1, eval_batch * now // before)
    return with_layout(plan, layout, eval_batch, recipe=recipe, cluster=cluster)


def with_layout(
    plan: Plan, layout: Layout, eval_batch_size: int, *, recipe: FullRecipe, cluster: Cluster
) -> Plan:
    """Returns the plan with another layout, without the predictions, which were of the first.

    What was requested for the job (memory, time limit, cores) stays.

    Args:
        plan: the plan.
        layout: its new layout.
        eval_batch_size: examples per rank and forward pass when scoring.
        recipe: the run's recipe.
        cluster: the run's profile.
    """
    if (layout, eval_batch_size) == (plan.layout, plan.per_device_eval_batch_size):
        return plan
    inputs = PlanInputs.of_plan(recipe, cluster, plan)
    return plan.model_copy(
        update={
            "layout": layout,
            "per_device_eval_batch_size": eval_batch_size,
            "ds_config": build_deepspeed_config(inputs, layout),
            "gpu_memory": [],
            "host_memory": [],
            "time": None,
            "disk": [],
            "node_disk_bytes": 0,
            "reasons": [],
            "next_best": None,
            "cheaper_infeasible": [],
        }
    )


def next_layout(
    layout: Layout,
    recipe: FullRecipe,
    cluster: Cluster,
    *,
    in_step: bool = True,
    supports_chunked_loss: bool = False,
) -> Layout | None:
    """Returns the next layout with less memory on the same ranks; None where none is left.

    It halves the micro-batch. At a micro-batch of 1 it recomputes activations, then computes the
    loss in parts, then shards and offloads more of the model states.

    Args:
        layout: the layout that runs now.
        recipe: the run's recipe.
        cluster: the run's profile.
        in_step: whether memory ran out in a training step; if not, a smaller micro-batch or
            checkpointing would not help.
        supports_chunked_loss: whether the model's loss can be computed in parts.
    """
    free = with_auto_batch(recipe, nodes=layout.nodes, gpus_per_node=layout.ranks_per_node)
    same_ranks = [
        other
        for other in allowed_layouts(free, cluster, supports_chunked_loss=supports_chunked_loss)
        if _shape(other) == _shape(layout)
    ]
    micro = layout.per_device_train_batch_size
    if in_step and micro > 1:
        smaller = [
            other
            for other in same_ranks
            if _memory_rank(other) == _memory_rank(layout)
            and other.per_device_train_batch_size <= micro // 2
        ]
        return max(smaller, key=lambda other: other.per_device_train_batch_size, default=None)
    less = [
        other
        for other in same_ranks
        if other.per_device_train_batch_size == micro
        and _needs_less(other, layout)
        and (in_step or _activation_rank(other) == _activation_rank(layout))
    ]
    # In the order of what it costs in speed: recomputing, a loss in parts, moving the states.
    return min(
        less,
        key=lambda o: (not same_sharding(o, layout), o.loss_chunks != layout.loss_chunks),
        default=None,
    )


def describe_change(before: Plan, after: Plan) -> str:
    """Returns what a fallback changed: `micro-batch 8 → 4`, or `2 → 4 nodes, resubmitted`."""
    old, new = before.layout, after.layout
    parts = []
    if new.nodes != old.nodes:
        parts.append(f"{old.nodes} → {new.nodes} nodes")
    if new.ranks_per_node != old.ranks_per_node:
        parts.append(f"{old.ranks_per_node} → {new.ranks_per_node} ranks on each")
    if new.per_device_train_batch_size != old.per_device_train_batch_size:
        sizes = f"{old.per_device_train_batch_size} → {new.per_device_train_batch_size}"
        parts.append(f"micro-batch {sizes}")
    if new.gradient_checkpointing != old.gradient_checkpointing:
        parts.append("checkpointing")
    if new.loss_chunks != old.loss_chunks:
        parts.append(f"loss in {new.loss_chunks} parts")
    if new.zero_stage != old.zero_stage:
        was = f"ZeRO-{old.zero_stage}" if old.zero_stage else "no sharding"
        parts.append(f"{was} → ZeRO-{new.zero_stage}")
    if new.offload_optimizer != old.offload_optimizer:
        parts.append(f"optimizer on {new.offload_optimizer}")
    if new.offload_param != old.offload_param:
        parts.append(f"parameters on {new.offload_param}")
    if _shape(new) != _shape(old):
        parts.append("resubmitted")
    if not parts and after.mem_mib != before.mem_mib:
        old_bytes, new_bytes = (plan.mem_mib * MIB for plan in (before, after))
        parts.append(f"host memory {format_bytes(old_bytes)} → {format_bytes(new_bytes)}")
    if not parts:
        sizes = f"{before.per_device_eval_batch_size} → {after.per_device_eval_batch_size}"
        parts.append(f"evaluation batch {sizes}")
    return ", ".join(parts)


def double_host_memory(plan: Plan) -> Plan | None:
    """Returns the plan with twice the requested host memory; None where nodes have no more."""
    limit_mib = plan.host_capacity_bytes // MIB
    if plan.mem_mib >= limit_mib:
        return None
    return plan.model_copy(update={"mem_mib": min(2 * plan.mem_mib, limit_mib)})


def same_sharding(one: Layout, other: Layout) -> bool:
    """Returns whether weights and optimizer are split in the same way.

    A checkpoint of one layout then loads in the other.
    """
    return (_shape(one), _state_rank(one)) == (_shape(other), _state_rank(other))


def next_node_count(layout: Layout, recipe: FullRecipe, cluster: Cluster) -> int | None:
    """Returns the next number of nodes that need less memory each; None where more do not help."""
    nodes = [
        other.nodes
        for other in allowed_layouts(with_auto_batch(recipe, nodes="auto"), cluster)
        if other.nodes > layout.nodes
        and other.ranks_per_node >= layout.ranks_per_node
        # Without sharding each rank holds everything, however many there are.
        and other.zero_stage >= max(layout.zero_stage, 1)
    ]
    return min(nodes, default=None)


def with_auto_batch(recipe: FullRecipe, **resources: object) -> FullRecipe:
    """Returns the recipe with micro-batch and checkpointing set to auto.

    Args:
        recipe: the recipe.
        **resources: fields of its resources to change too.
    """
    free = {"per_device_train_batch_size": "auto", "gradient_checkpointing": "auto"}
    return recipe.model_copy(
        update={
            "train": recipe.train.model_copy(update=free),
            "resources": recipe.resources.model_copy(update=resources),
        }
    )


def _shape(layout: Layout) -> tuple[int, int]:
    return layout.nodes, layout.ranks_per_node


def _activation_rank(layout: Layout) -> tuple[int, ...]:
    """Returns numbers that are smaller where a layout keeps less of a step's activations."""
    return int(not layout.gradient_checkpointing), -layout.loss_chunks


def _state_rank(layout: Layout) -> tuple[int, ...]:
    """Returns numbers that are smaller where a layout keeps less of the states on the device."""
    return (
        3 - layout.zero_stage,
        int(layout.offload_optimizer == "none"),
        int(layout.offload_param == "none"),
    )


def _memory_rank(layout: Layout) -> tuple[int, ...]:
    return (*_activation_rank(layout), *_state_rank(layout))


def _needs_less(one: Layout, other: Layout) -> bool:
    """Returns whether a layout keeps less than another in one respect, and nothing more."""
    pairs = list(zip(_memory_rank(one), _memory_rank(other), strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)
