"""Predicts the memory of a rank's device: traced tensors, ZeRO or DDP buffers, overhead."""

from __future__ import annotations

from collections.abc import Iterable

from hpcft.core.records import Cluster, Layout, MemoryItem
from hpcft.core.units import GIB
from hpcft.planning.hardware import FLASH_ATTENTION_CAPABILITY, has_capability
from hpcft.planning.inputs import PlanInputs
from hpcft.planning.memory import few_shot, model_states, zero_memory
from hpcft.planning.memory.trace_types import KINDS, PHASES, LinearBytes, StepMemory, TracedStep

# Memory that the caching allocator reserves and cannot use, as a share of the tensors. It reserves
# segments of 2 and 20 MiB; the share grows in long runs. A profile's calibration replaces it.
FRAGMENTATION_SHARE = 0.05
# Largest evaluation batch that the planner chooses.
MAX_SCORED_EXAMPLES = 64


def tensor_items(inputs: PlanInputs, layout: Layout) -> tuple[list[MemoryItem], int]:
    """Returns a rank's tensors at its peak by component, and its evaluation batch.

    Raises:
        DataError: the model or the method cannot be traced.
    """
    if inputs.recipe.mode == "few_shot":
        items = few_shot.few_shot_items(inputs, layout)
        return items, layout.per_device_train_batch_size
    traced = inputs.trace(traced_step(inputs, layout))
    items = peak_items(inputs, layout, traced)
    training_bytes = total_bytes(items)
    batch, evaluation_bytes = evaluation_batch(inputs, layout, traced, training_bytes)
    if evaluation_bytes > training_bytes:
        size = evaluation_bytes - training_bytes
        rule = f"scoring {batch} at once takes more than training"
        items.append(MemoryItem(name="evaluation", bytes=size, rule=rule))
    return items, batch


def traced_step(inputs: PlanInputs, layout: Layout) -> TracedStep:
    """Returns what has to be traced for a layout; layouts of one kind share it.

    The examples of a micro-batch of several differ in length, so that attention takes a mask.
    """
    recipe, facts, cluster = inputs.recipe, inputs.facts, inputs.cluster
    micro, stage = layout.per_device_train_batch_size, layout.zero_stage
    sizes = zero_memory.zero_sizes(facts, layout) if stage else None
    if stage == 1 and sizes and facts.parameters.largest_trained <= sizes.reduce_bucket_elements:
        stage = 2  # The two stages differ only in gradients that no bucket holds.
    return TracedStep(
        model=recipe.model,
        task=recipe.task.as_trained,
        method=recipe.method,
        precision=inputs.precision,
        # Under ZeRO the optimizer works on shards, which are no part of the trace.
        optim="" if stage else inputs.optim,
        zero_stage=stage,
        zero=sizes,
        checkpointing=layout.gradient_checkpointing,
        loss_chunks=layout.loss_chunks,
        single_example=micro == 1,
        padded=micro > 1,
        packed=recipe.packs(facts.model_type),
        accelerator=cluster.accelerator,
        flash_attention=has_capability(cluster, FLASH_ATTENTION_CAPABILITY),
    )


def peak_items(inputs: PlanInputs, layout: Layout, traced: StepMemory) -> list[MemoryItem]:
    """Returns a rank's tensors at the peak of an optimizer step, by component.

    Args:
        inputs: what is planned.
        layout: how the run is laid out.
        traced: the memory of the layout's `traced_step`.
    """
    micro, ranks = layout.per_device_train_batch_size, layout.world_size
    if layout.gradient_accumulation_steps > 1 and not layout.zero_stage:
        traced = traced.with_accumulation()
    is_sharding_gradients = layout.zero_stage in (1, 2)
    counts = inputs.facts.parameters
    share = zero_memory.largest_share(counts, ranks) if is_sharding_gradients else 1.0
    per_phase: dict[str, list[MemoryItem]] = {phase: [] for phase in PHASES}
    if layout.zero_stage:
        per_phase = {
            phase: zero_memory.per_phase_items(inputs, layout, phase, share) for phase in PHASES
        }

    def moment_bytes(line: LinearBytes) -> int:
        return sum(line.at(micro, share)) + total_bytes(per_phase[line.phase])

    top = max(traced.training, key=moment_bytes)
    rule = f"traced: {top.segment}, B {micro}"
    items = [
        MemoryItem(name=kind, bytes=size, rule=rule + _per_rank(kind, ranks))
        for kind, size in zip(KINDS, top.at(micro, share), strict=True)
        if size
    ]
    return [*items, *outside_trace(inputs, layout), *per_phase[top.phase]]


def lower_bound_bytes(inputs: PlanInputs, layout: Layout) -> int:
    """Returns a lower bound of a rank's tensors from closed forms, without a trace.

    Where something is trained it is the memory at the optimizer step, which holds all gradients.
    """
    least = model_states.persistent_bytes(inputs, layout)
    if not inputs.method.trains:
        return least
    counts = inputs.facts.parameters
    outside = total_bytes(outside_trace(inputs, layout))
    if layout.zero_stage == 0:
        return least + outside + 4 * counts.trainable
    share = zero_memory.largest_share(counts, layout.world_size)
    work = zero_memory.per_phase_items(inputs, layout, "optimizer", share)
    return max(least, outside) + total_bytes(work)


def outside_trace(inputs: PlanInputs, layout: Layout) -> list[MemoryItem]:
    """Returns persistent memory that the trace does not see: ZeRO shards or DDP buckets."""
    if layout.zero_stage:
        return zero_memory.persistent_items(inputs, layout)
    trained = inputs.facts.parameters.trainable
    if layout.world_size == 1 or not trained:
        return []
    # «The saved memory size will be equal to the total gradients size» (PyTorch on
    # DistributedDataParallel's gradient_as_bucket_view, which the Trainer leaves off).
    rule = f"4 bytes × T {trained:,} (all-reduce)"
    return [MemoryItem(name="gradient buckets", bytes=4 * trained, rule=rule)]


def evaluation_batch(
    inputs: PlanInputs, layout: Layout, traced: StepMemory, training_bytes: int
) -> tuple[int, int]:
    """Returns the number of examples that a rank scores at once, and the bytes that this takes.

    Args:
        inputs: what is planned.
        layout: how the run is laid out.
        traced: the memory of the layout's `traced_step`.
        training_bytes: the peak of training. A batch that the planner chooses takes no more, unless
            it is a single example.
    """
    outside = total_bytes(outside_trace(inputs, layout))
    micro = layout.per_device_train_batch_size
    fixed = inputs.recipe.evaluation.per_device_eval_batch_size if inputs.method.trains else micro
    if fixed != "auto":
        return fixed, traced.evaluation_bytes(fixed) + outside
    batch = min(MAX_SCORED_EXAMPLES, 4 * micro)
    while batch > 1 and traced.evaluation_bytes(batch) + outside > training_bytes:
        batch //= 2
    return batch, traced.evaluation_bytes(batch) + outside


def overhead_items(inputs: PlanInputs, layout: Layout, tensor_bytes: int) -> list[MemoryItem]:
    """Returns what a rank holds besides tensors: fragments, and its process or CUDA context.

    Args:
        inputs: what is planned.
        layout: how the run is laid out.
        tensor_bytes: tensors of the rank at its peak.
    """
    calibration = inputs.cluster.calibration
    if not inputs.on_gpu:
        return model_states.process_items(inputs.cluster, tensor_bytes)
    share = calibration.fragmentation or FRAGMENTATION_SHARE
    fragments = MemoryItem(
        name=model_states.FRAGMENTATION_ITEM,
        bytes=int(share * tensor_bytes),
        rule=f"{share:.0%} of the above" + ", calibrated" * (calibration.fragmentation is not None),
    )
    return [fragments, *model_states.context_items(layout, inputs.cluster)]


def capacity_bytes(cluster: Cluster, layout: Layout) -> int:
    """Returns the memory that one rank may use: of its GPU, or its share of the node's."""
    if cluster.accelerator == "cpu":
        return int(cluster.host_memory_gib * GIB) // layout.ranks_per_node
    assert cluster.gpu is not None
    return int((cluster.gpu.memory_gib - cluster.gpu.other_processes_gib) * GIB)


def total_bytes(items: Iterable[MemoryItem]) -> int:
    """Returns the sum of all components, in bytes."""
    return sum(item.bytes for item in items)


def _per_rank(kind: str, ranks: int) -> str:
    return f" / N {ranks}" if kind == KINDS[-1] and ranks > 1 else ""
