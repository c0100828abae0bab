"""What a run writes: checkpoints, the finished model, and what is offloaded to a node's disk."""

from __future__ import annotations

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.records import Layout, MemoryItem, ModelFacts, Precision
from hpcft.methods.base import COMPUTE_BYTES
from hpcft.planning.memory.model_states import MOMENT_BYTES

# Offloaded to NVMe, for each trained parameter: fp32 weight, gradient and two moments.
NVME_OPTIMIZER_BYTES = 16


def model_bytes(facts: ModelFacts, recipe: FullRecipe, layout: Layout, precision: Precision) -> int:
    """Size of the finished model: an adapter, or all weights in the type that they train in."""
    p = facts.parameters
    saved = p.trainable if recipe.method.adapter else p.total
    return saved * (COMPUTE_BYTES[precision] if layout.zero_stage else 4)


def checkpoint_bytes(
    facts: ModelFacts, recipe: FullRecipe, layout: Layout, precision: Precision
) -> int:
    """Size of a checkpoint: the model and the optimizer's states.

    DeepSpeed writes weights in its own shards beside the model, and an fp32 master copy: 2 + 2 + 12
    bytes a parameter for full fine-tuning in 16 bits.
    """
    weights = model_bytes(facts, recipe, layout, precision)
    states = MOMENT_BYTES[recipe.train.optim] + (4 if layout.zero_stage else 0)
    return int(weights * (2 if layout.zero_stage else 1) + states * facts.parameters.trainable)


def run_folder_items(
    facts: ModelFacts,
    recipe: FullRecipe,
    layout: Layout,
    precision: Precision,
    checkpoints: int | None,
) -> list[MemoryItem]:
    """What the run folder holds at most; `checkpoints` are those asked for, None where unknown.

    A checkpoint is complete before the oldest is deleted, so one more than `save_total_limit` is
    there at a time; and the best one is kept beside the last. The newest may be one that is only
    there to go on from, which any run writes before its time limit or a preemption.
    """
    train, method = recipe.train, recipe.method
    if not method.trains:
        return []
    size = model_bytes(facts, recipe, layout, precision)
    items = [MemoryItem(name="finished model", bytes=size, rule="weights, or the adapter")]
    if not method.can_resume:
        return items
    each = checkpoint_bytes(facts, recipe, layout, precision)
    kept = [n + 1 for n in (train.save_total_limit,) if n]
    written = [] if checkpoints is None else [checkpoints + 2]
    count = min(kept + written, default=2) + train.load_best_model_at_end
    items.append(
        MemoryItem(
            name="checkpoints",
            bytes=count * each,
            rule=f"{count} at a time × {each:,} bytes",
        )
    )
    return items


def node_disk_bytes(facts: ModelFacts, layout: Layout, precision: Precision) -> int:
    """Room that offloading takes on the disk of each node."""
    p = facts.parameters
    optimizer = NVME_OPTIMIZER_BYTES * p.trainable if layout.offload_optimizer == "nvme" else 0
    param = COMPUTE_BYTES[precision] * p.total if layout.offload_param == "nvme" else 0
    return -(-(optimizer + param) // layout.nodes)
