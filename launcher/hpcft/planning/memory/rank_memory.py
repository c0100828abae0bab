"""Memory of a rank's device by component: the trace, and what ZeRO or data parallelism add."""

from __future__ import annotations

from dataclasses import dataclass

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.records import Calibration, Cluster, Layout, MemoryItem, ModelFacts, Precision
from hpcft.methods import AnyMethod
from hpcft.planning.memory import model_states, zero_memory
from hpcft.planning.memory.trace_types import KINDS, PHASES, LinearBytes, StepMemory, TracedStep

# Reserved beyond what tensors take; within 2 MiB and 20 MiB segments, by long use more. A profile's
# calibration replaces it.
FRAGMENTATION = 0.05
# Ampere; PyTorch, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp.
FLASH_CAPABILITY = 8.0
# Examples that are scored at once, at most.
MOST_SCORED = 64


@dataclass(frozen=True)
class Peak:
    """The moment of a step at which a rank holds the most."""

    part: str
    """Part of the step: `forward head`, `backward 0`, `optimizer`, …"""
    items: list[MemoryItem]
    """What is there, by component."""

    @property
    def total_bytes(self) -> int:
        """All together."""
        return sum(item.bytes for item in self.items)


def traced_step(
    recipe: FullRecipe, layout: Layout, cluster: Cluster, facts: ModelFacts, precision: Precision
) -> TracedStep:
    """What has to be traced for a layout; layouts of one kind share it.

    Examples of one micro-batch differ in length, so that attention takes a mask, unless there is
    only one.
    """
    micro = layout.per_device_train_batch_size
    stage = layout.zero_stage
    sizes = zero_memory.zero_sizes(facts, recomputes=layout.recomputes) if stage else None
    if stage == 1 and sizes and facts.parameters.largest_trained <= sizes.reduce_bucket_elements:
        stage = 2  # they differ in gradients that no bucket holds
    has_flash = cluster.accelerator == "cuda" and (
        cluster.gpu is not None and cluster.gpu.compute_capability >= FLASH_CAPABILITY
    )
    return TracedStep(
        model=recipe.model,
        task=recipe.task.as_trained,
        method=recipe.method,
        precision=precision,
        # Under ZeRO the optimizer works on shards, which are no part of the trace.
        optim="" if stage else recipe.train.optim,
        zero_stage=stage,
        zero=sizes,
        checkpointing=layout.gradient_checkpointing,
        loss_chunks=layout.loss_chunks,
        single=micro == 1,
        padded=micro > 1,
        packed=recipe.packs(facts.model_type),
        accelerator=cluster.accelerator,
        flash_attention=has_flash,
    )


def peak_memory(
    traced: StepMemory,
    facts: ModelFacts,
    layout: Layout,
    precision: Precision,
    optim: str,
    *,
    on_gpu: bool,
) -> Peak:
    """The moment of an optimizer step with the most memory.

    Args:
        traced: the curve of the layout's `step_of`.
        facts: the model.
        layout: how the run is laid out.
        precision: compute precision.
        optim: optimizer.
        on_gpu: whether ranks compute on GPUs.
    """
    micro, ranks = layout.per_device_train_batch_size, layout.world_size
    if layout.gradient_accumulation_steps > 1 and not layout.zero_stage:
        traced = traced.accumulating()
    share = (
        zero_memory.largest_share(facts.parameters, ranks) if layout.zero_stage in (1, 2) else 1.0
    )
    passing = {
        phase: zero_memory.per_phase_bytes(
            phase, facts, layout, precision, optim, share, on_gpu=on_gpu
        )
        if layout.zero_stage
        else []
        for phase in PHASES
    }

    def total(line: LinearBytes) -> int:
        return sum(line.at(micro, share)) + sum(item.bytes for item in passing[line.phase])

    top = max(traced.training, key=total)
    items = [
        MemoryItem(name=name, bytes=size, rule=f"traced: {top.part}, B {micro}" + _by(name, ranks))
        for name, size in zip(KINDS, top.at(micro, share), strict=True)
        if size
    ]
    lasting = outside_trace(facts, layout, precision, optim)
    return Peak(top.part, items + lasting + passing[top.phase])


def lower_bound_bytes(
    facts: ModelFacts,
    method: AnyMethod,
    layout: Layout,
    precision: Precision,
    optim: str,
    *,
    on_gpu: bool,
) -> int:
    """Tensors of a rank at least, whatever a trace says of activations; arguments as for `peak`.

    Where something is trained it is what is there when the optimizer takes the gradients.
    """
    least = model_states.persistent_bytes(facts, method, layout, precision, optim)
    if not method.trains:
        return least
    shared = sum(item.bytes for item in outside_trace(facts, layout, precision, optim))
    if layout.zero_stage == 0:
        return least + shared + 4 * facts.parameters.trainable
    share = zero_memory.largest_share(facts.parameters, layout.world_size)
    work = zero_memory.per_phase_bytes(
        "optimizer", facts, layout, precision, optim, share, on_gpu=on_gpu
    )
    return max(least, shared) + sum(item.bytes for item in work)


def outside_trace(
    facts: ModelFacts, layout: Layout, precision: Precision, optim: str
) -> list[MemoryItem]:
    """What is there all the time beside the trace."""
    if layout.zero_stage:
        return zero_memory.persistent_items(facts, layout, precision, optim)
    trained = facts.parameters.trainable
    if layout.world_size == 1 or not trained:
        return []
    # «The saved memory size will be equal to the total gradients size» (PyTorch on
    # DistributedDataParallel's gradient_as_bucket_view, which the Trainer leaves off).
    rule = f"4 bytes × T {trained:,} (all-reduce)"
    return [MemoryItem(name="gradient buckets", bytes=4 * trained, rule=rule)]


def evaluation_batch(
    traced: StepMemory, most_bytes: int, beside_bytes: int, micro_batch: int, *, fixed: int | None
) -> tuple[int, int]:
    """Examples that are scored at once, and the memory that it takes.

    Args:
        traced: the curve of the step.
        most_bytes: what training takes: scoring is given no more, but a micro-batch of one fits
            where it must.
        beside_bytes: what is there all the time beside the trace.
        micro_batch: training's.
        fixed: what the recipe says, if it does.
    """
    if fixed is not None:
        return fixed, traced.evaluation_bytes(fixed) + beside_bytes
    batch = min(MOST_SCORED, 4 * micro_batch)
    while batch > 1 and traced.evaluation_bytes(batch) + beside_bytes > most_bytes:
        batch //= 2
    return batch, traced.evaluation_bytes(batch) + beside_bytes


def fragmentation_item(items: list[MemoryItem], known: Calibration) -> MemoryItem:
    """What the caching allocator reserves and cannot use: a share of the tensors."""
    share = known.fragmentation or FRAGMENTATION
    rule = f"{share:.0%} of the above" + ", calibrated" * (known.fragmentation is not None)
    size = int(share * sum(item.bytes for item in items))
    return MemoryItem(name=model_states.FRAGMENTATION, bytes=size, rule=rule)


def _by(name: str, ranks: int) -> str:
    return f" / N {ranks}" if name == KINDS[-1] and ranks > 1 else ""
