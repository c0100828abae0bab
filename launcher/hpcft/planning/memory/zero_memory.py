"""Predicts the memory of DeepSpeed's ZeRO outside the trace: shards, partitions, buckets.

P is all parameters, T the trained ones, N the ranks, w the bytes of a weight (2 in 16 bits).
Followed in DeepSpeed 0.19 (runtime/zero/stage_1_and_2.py and stage3.py); the figures agree with
«Memory Requirements» (memory.rst), which gives 2 + 2 + 12 bytes a trained parameter in 16 bits.
"""

from __future__ import annotations

from hpcft.core.records import Layout, MemoryItem, ModelFacts, ParameterCount, ZeroSizes
from hpcft.methods.base import COMPUTE_BYTES
from hpcft.planning.inputs import PlanInputs
from hpcft.planning.memory.model_states import MOMENT_BYTES

# ZeRO-3's optimizer updates a rank's shard in groups, and needs at least 8 bytes of work space per
# element of a group: 7.5 GiB at DeepSpeed's 1e9, which the shards of an 8B model on 8 GPUs just
# reach. A tenth of that is as fast: each kernel still reads and writes gigabytes.
SUB_GROUP_ELEMENTS = 100_000_000


def zero_sizes(facts: ModelFacts, layout: Layout) -> ZeroSizes:
    """Returns the sizes that DeepSpeed is given; the first three are Transformers' own `auto`.

    About two layers may be gathered at once: one in use and one ahead of its use (DeepSpeed's 1e9
    is a fifth of a small GPU, and it gathers ahead for every module, with weights or without). A
    parameter is released when its module is done. Where modules run again (`Layout.recomputes`) it
    stays if it is used again within two layers: what was gathered to recompute a layer serves its
    backward pass too, and the output layer is gathered once for all chunks of a loss.
    """
    hidden = facts.hidden_size**2
    two_layers = min(2 * facts.parameters.layer, 1_000_000_000)
    return ZeroSizes(
        reduce_bucket_elements=int(min(max(hidden, 1_000_000), 500_000_000)),
        prefetch_bucket_elements=int(0.9 * hidden),
        persistence_threshold_elements=10 * facts.hidden_size,
        max_live_elements=two_layers,
        max_reuse_distance_elements=two_layers if layout.recomputes else 0,
        sub_group_elements=SUB_GROUP_ELEMENTS,
    )


def persistent_items(inputs: PlanInputs, layout: Layout) -> list[MemoryItem]:
    """Returns the ZeRO memory that a rank holds for the whole run, by component."""
    p, n, stage = inputs.facts.parameters, layout.world_size, layout.zero_stage
    w = COMPUTE_BYTES[inputs.precision]
    items: list[MemoryItem] = []

    def add(name: str, size_bytes: float, rule: str) -> None:
        if size_bytes:
            items.append(MemoryItem(name=name, bytes=int(size_bytes), rule=rule))

    if stage == 3:
        unquantised = p.total - p.quantised
        if layout.offload_param == "none":
            add("weight shards", w * unquantised / n, f"{w} bytes × P {unquantised:,} / N {n}")
        bucket = zero_sizes(inputs.facts, layout).reduce_bucket_elements
        add("reduce bucket", w * bucket, f"{w} bytes × {bucket:,} elements")
        if layout.offload_optimizer == "none":
            add("gradient shards", w * p.trainable / n, f"{w} bytes × T / N {n}")
    if layout.offload_optimizer == "none":
        moments = MOMENT_BYTES[inputs.optim]
        add("master weights", 4 * p.trainable / n, f"4 bytes × T {p.trainable:,} / N {n}")
        add("optimizer states", moments * p.trainable / n, f"{moments:g} bytes × T / N {n}")
    elif stage < 3:
        rule = f"{w} bytes × the largest parameter"
        add("buffer to offload a gradient", w * p.largest_trained, rule)
    return items


def largest_share(counts: ParameterCount, ranks: int) -> float:
    """Returns the largest share of trained parameters whose gradients one rank keeps.

    It is at least 1 / N. ZeRO-1 and 2 concatenate all matrices, and all vectors, and cut each of
    the two into N equal parts; a rank keeps the whole gradient of a tensor that lies across a cut.
    """
    if not counts.trained_tensors:
        return 1 / ranks
    kept = [0] * ranks
    for numels in (counts.trained_tensors, counts.trained_vectors):
        part = max(1, -(-sum(numels) // (2 * ranks)) * 2)
        start = 0
        for numel in numels:
            for rank in range(start // part, min((start + numel - 1) // part, ranks - 1) + 1):
                kept[rank] += numel
            start += numel
    return max(kept) / counts.trainable


def largest_group(counts: ParameterCount, ranks: int, elements: int) -> int:
    """Returns the most elements of a rank's shard that ZeRO-3's optimizer updates at once.

    DeepSpeed adds one parameter's share after the other to a group until it has at least `elements`
    of the rank's own (stage3.py, `_create_fp16_sub_groups`), so that the last one may exceed them.
    """
    largest = 0
    for numels in (counts.trained_tensors, counts.trained_vectors):
        group = 0
        for numel in numels:
            group += -(-numel // ranks)
            largest = max(largest, group)
            group = group if group < elements else 0
    return largest or min(-(-counts.trainable // ranks), elements)


def per_phase_items(
    inputs: PlanInputs, layout: Layout, phase: str, share: float
) -> list[MemoryItem]:
    """Returns the ZeRO memory that a rank holds during one phase of a step only, by component.

    Args:
        inputs: what is planned.
        layout: how the run is laid out; its ZeRO stage is at least 1.
        phase: `forward`, `backward` or `optimizer`.
        share: part of the gradients that the rank keeps below ZeRO-3, from `largest_share`.
    """
    p, n, stage = inputs.facts.parameters, layout.world_size, layout.zero_stage
    w, kept = COMPUTE_BYTES[inputs.precision], p.trainable * share
    is_offloaded = layout.offload_optimizer != "none"
    accumulates = layout.gradient_accumulation_steps > 1
    items: list[MemoryItem] = []

    def add(name: str, size_bytes: float, rule: str) -> None:
        items.append(MemoryItem(name=name, bytes=int(size_bytes), rule=rule))

    if stage < 3 and accumulates and not is_offloaded and phase != "optimizer":
        add("accumulated gradient shards", w * kept, f"{w} bytes × T / N {n}")
    if phase == "optimizer" and not is_offloaded:
        group = p.trainable / n
        if stage == 3:
            group = largest_group(p, n, zero_sizes(inputs.facts, layout).sub_group_elements)
        # DeepSpeed flattens the shard's gradients and casts them; the optimizer uses the copies.
        each = max(w + 4 if w < 4 else w, 4 + _optimizer_temporaries(inputs))
        gradients = w * kept if stage < 3 else 0
        # Norms are computed in fp64, one gradient (under ZeRO-3 its shard) after the other.
        norm = 8 * p.largest_trained / (n if stage == 3 else 1)
        add(
            "optimizer's work",
            max(each * group, norm) + gradients,
            f"{each:g} bytes × {group:,.0f} of a shard, or norms in fp64"
            + (f", and {w} bytes × T / N" if gradients else ""),
        )
    return items


def _optimizer_temporaries(inputs: PlanInputs) -> int:
    """Returns the bytes of AdamW's temporaries for each parameter: √v, on a CPU two of them."""
    if inputs.optim != "adamw_torch":
        return 0  # Fused kernels work in place.
    return 4 if inputs.on_gpu else 8
