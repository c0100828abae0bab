"""The ladder: what a run that is out of memory changes next, and what later runs learn from it.

Every rung keeps the global batch, and so the loss up to rounding. The rungs are layouts that the
planner may choose too, taken in the order of what they cost in speed; the last one, more nodes,
takes another job (`more_nodes`).
"""

from __future__ import annotations

from typing import Any, Literal

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.records import Cluster, Layout, Plan
from hpcft.core.units import MIB, format_bytes
from hpcft.planning.deepspeed_config import build_deepspeed_config
from hpcft.planning.layouts import allowed_layouts

Stage = Literal["states", "step", "evaluation"]
"""What memory ran out for: weights and optimizer, a training step, or scoring."""


def next_fallback(plan: Plan, recipe: FullRecipe, cluster: Cluster, stage: Stage) -> Plan | None:
    """The plan of the next rung below; None where nothing is left that the same ranks could do.

    Args:
        plan: what runs now.
        recipe: the run's recipe. A micro-batch or checkpointing that it fixes is lowered all the
            same, for neither changes what is computed; sharding and offloading that it fixes stay.
        cluster: the run's profile.
        stage: what memory ran out for.
    """
    scored = plan.per_device_eval_batch_size
    if stage == "evaluation" and scored > 1:
        return with_layout(plan, plan.layout, scored // 2, recipe, cluster)
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
        # Chosen as a multiple of the micro-batch, and it stays one.
        before, now = (x.per_device_train_batch_size for x in (plan.layout, layout))
        scored = max(1, scored * now // before)
    return with_layout(plan, layout, scored, recipe, cluster)


def with_layout(
    plan: Plan, layout: Layout, eval_batch_size: int, recipe: FullRecipe, cluster: Cluster
) -> Plan:
    """Returns the plan with another layout, without the predictions, which were of the first.

    What the job was given (memory, time limit, cores) stays.
    """
    if (layout, eval_batch_size) == (plan.layout, plan.per_device_eval_batch_size):
        return plan
    return plan.model_copy(
        update={
            "layout": layout,
            "per_device_eval_batch_size": eval_batch_size,
            "ds_config": build_deepspeed_config(
                layout, plan.precision, plan.facts, recipe.train, cluster
            ),
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
    """The layout below: half the micro-batch; at 1 checkpointing, loss in parts, moving states.

    Args:
        layout: what runs now.
        recipe: the run's recipe.
        cluster: the run's profile.
        in_step: whether it was a training step that lacked memory; if not, a smaller micro-batch
            or checkpointing would not help.
        supports_chunked_loss: whether the model's loss can be computed in parts.
    """
    here = with_auto_batch(recipe, nodes=layout.nodes, gpus_per_node=layout.ranks_per_node)
    below = [
        other
        for other in allowed_layouts(here, cluster, supports_chunked_loss=supports_chunked_loss)
        if _shape(other) == _shape(layout)
    ]
    if in_step and layout.per_device_train_batch_size > 1:
        alike = [o for o in below if _demand(o) == _demand(layout)]
        half = layout.per_device_train_batch_size // 2
        sizes = [o for o in alike if o.per_device_train_batch_size <= half]
        return max(sizes, key=lambda o: o.per_device_train_batch_size, default=None)
    less = [
        o
        for o in below
        if o.per_device_train_batch_size == layout.per_device_train_batch_size
        and _is_less(o, layout)
        and (in_step or _activations(o) == _activations(layout))
    ]
    # In the order of what it costs in speed: recomputing, a loss in parts, moving the states.
    return min(
        less,
        key=lambda o: (not same_sharding(o, layout), o.loss_chunks != layout.loss_chunks),
        default=None,
    )


def describe_change(before: Plan, after: Plan) -> str:
    """What a rung changed: `micro-batch 8 → 4`, `checkpointing`, `2 → 4 nodes, queued anew`."""
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
    """The plan with twice the memory of its nodes asked for; None where they have no more."""
    most_mib = plan.host_capacity_bytes // MIB
    if plan.mem_mib >= most_mib:
        return None
    return plan.model_copy(update={"mem_mib": min(2 * plan.mem_mib, most_mib)})


def same_sharding(one: Layout, other: Layout) -> bool:
    """Whether weights and optimizer lie alike: a checkpoint of one layout loads in the other."""
    return (_shape(one), _states(one)) == (_shape(other), _states(other))


def next_node_count(layout: Layout, recipe: FullRecipe, cluster: Cluster) -> int | None:
    """The next number of nodes that would hold less each; None where more would not help."""
    nodes = [
        other.nodes
        for other in allowed_layouts(with_auto_batch(recipe, nodes="auto"), cluster)
        if other.nodes > layout.nodes
        and other.ranks_per_node >= layout.ranks_per_node
        and other.zero_stage >= max(layout.zero_stage, 1)  # unsharded, each rank holds it all
    ]
    return min(nodes, default=None)


def with_auto_batch(recipe: FullRecipe, **resources: Any) -> FullRecipe:
    """The recipe with micro-batch and checkpointing left open, and resources as given."""
    free = {"per_device_train_batch_size": "auto", "gradient_checkpointing": "auto"}
    train = recipe.train.model_copy(update=free)
    held = recipe.resources.model_copy(update=resources)
    return recipe.model_copy(update={"train": train, "resources": held})


def _shape(layout: Layout) -> tuple[int, int]:
    return layout.nodes, layout.ranks_per_node


def _activations(layout: Layout) -> tuple[int, ...]:
    """What a layout keeps of a step, whatever its micro-batch: smaller numbers hold less."""
    return int(not layout.gradient_checkpointing), -layout.loss_chunks


def _states(layout: Layout) -> tuple[int, ...]:
    """What of weights and optimizer a layout keeps on the device: smaller numbers hold less."""
    return (
        3 - layout.zero_stage,
        int(layout.offload_optimizer == "none"),
        int(layout.offload_param == "none"),
    )


def _demand(layout: Layout) -> tuple[int, ...]:
    return (*_activations(layout), *_states(layout))


def _is_less(one: Layout, other: Layout) -> bool:
    """Whether a layout holds less than another, and nothing more."""
    pairs = list(zip(_demand(one), _demand(other), strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)
