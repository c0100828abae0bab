"""Predicts the disk space of a run: checkpoints, the finished model, offloaded states."""

from __future__ import annotations

from hpcft.core.records import Layout, MemoryItem
from hpcft.methods.base import COMPUTE_BYTES
from hpcft.planning.inputs import PlanInputs
from hpcft.planning.memory.model_states import MOMENT_BYTES

# Offloaded to NVMe, for each trained parameter: fp32 weight, gradient and two moments.
NVME_OPTIMIZER_BYTES = 16


def model_bytes(inputs: PlanInputs, layout: Layout) -> int:
    """Returns the size of the finished model in bytes: of an adapter, or of all weights."""
    p = inputs.facts.parameters
    saved = p.trainable if inputs.method.saves_adapter else p.total
    return saved * (COMPUTE_BYTES[inputs.precision] if layout.zero_stage else 4)


def checkpoint_bytes(inputs: PlanInputs, layout: Layout) -> int:
    """Returns the size of a checkpoint in bytes: the model and the optimizer's states.

    DeepSpeed writes weights in its own shards besides the model, and an fp32 master copy: 2 + 2 +
    12 bytes a parameter for full fine-tuning in 16 bits.
    """
    weights = model_bytes(inputs, layout)
    states = MOMENT_BYTES[inputs.optim] + (4 if layout.zero_stage else 0)
    trained = inputs.facts.parameters.trainable
    return int(weights * (2 if layout.zero_stage else 1) + states * trained)


def run_folder_items(
    inputs: PlanInputs, layout: Layout, checkpoints: int | None
) -> list[MemoryItem]:
    """Returns the largest size of the run folder, by component.

    A checkpoint is complete before the oldest is deleted, so one more than `save_total_limit` is
    there at a time; and the best one is kept besides the last. The newest may be one that only
    serves to resume, which any run writes before its time limit or a preemption.

    Args:
        inputs: what is planned.
        layout: how the run is laid out.
        checkpoints: number of checkpoints that the recipe asks for; None if it is unknown.
    """
    train, method = inputs.recipe.train, inputs.method
    if not method.trains:
        return []
    size = model_bytes(inputs, layout)
    items = [MemoryItem(name="finished model", bytes=size, rule="weights, or the adapter")]
    if not method.can_resume:
        return items
    each = checkpoint_bytes(inputs, layout)
    kept = [train.save_total_limit + 1] if train.save_total_limit else []
    written = [] if checkpoints is None else [checkpoints + 2]
    count = min(kept + written, default=2) + train.load_best_model_at_end
    rule = f"{count} at a time × {each:,} bytes"
    items.append(MemoryItem(name="checkpoints", bytes=count * each, rule=rule))
    return items


def node_disk_bytes(inputs: PlanInputs, layout: Layout) -> int:
    """Returns the room that offloading takes on the disk of each node, in bytes."""
    p = inputs.facts.parameters
    optimizer = NVME_OPTIMIZER_BYTES * p.trainable if layout.offload_optimizer == "nvme" else 0
    width = COMPUTE_BYTES[inputs.precision]
    param = width * p.total if layout.offload_param == "nvme" else 0
    return -(-(optimizer + param) // layout.nodes)
