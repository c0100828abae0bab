"""Memory per rank that DeepSpeed's ZeRO holds beside the trace: shards, partitions and buckets.

P is all parameters, T the trained ones, N the ranks, w the bytes of a weight (2 in 16 bits).
Followed in DeepSpeed 0.19 (runtime/zero/stage_1_and_2.py and stage3.py); the figures agree with
«Memory Requirements» (memory.rst), which gives 2 + 2 + 12 bytes a trained parameter in 16 bits.
"""

from __future__ import annotations

from hpcft.core.records import Layout, MemoryItem, ModelFacts, ParameterCount, Precision, ZeroSizes
from hpcft.methods.base import COMPUTE_BYTES
from hpcft.planning.memory.model_states import MOMENT_BYTES

# ZeRO-3's optimizer goes over a rank's shard in groups, and works in 8 bytes or more for each
# element of one: 7.5 GiB at DeepSpeed's 1e9, which the shards of an 8B model on 8 GPUs just reach.
# A tenth takes no longer: a handful of kernels then still reads and writes gigabytes.
SUB_GROUP_ELEMENTS = 100_000_000


def zero_sizes(facts: ModelFacts, *, recomputes: bool) -> ZeroSizes:
    """The sizes that DeepSpeed is given; the first three are Transformers' own `auto`.

    About two layers may be whole at once: one in use and one gathered ahead (DeepSpeed's 1e9 is a
    fifth of a small GPU, and it gathers ahead for every module, whether it has weights or not).
    A parameter goes when its module is done. Where modules run again (`Layout.recomputes`) it stays
    if it is used again within two layers: what was gathered to recompute one serves its backward
    pass as well, and the output layer is gathered once for all parts of a loss.
    """
    hidden = facts.hidden_size**2
    two_layers = min(2 * facts.parameters.layer, 1_000_000_000)
    return ZeroSizes(
        reduce_bucket_elements=int(min(max(hidden, 1_000_000), 500_000_000)),
        prefetch_bucket_elements=int(0.9 * hidden),
        persistence_threshold_elements=10 * facts.hidden_size,
        max_live_elements=two_layers,
        max_reuse_distance_elements=two_layers if recomputes else 0,
        sub_group_elements=SUB_GROUP_ELEMENTS,
    )


def persistent_items(
    facts: ModelFacts, layout: Layout, precision: Precision, optim: str
) -> list[MemoryItem]:
    """What is there all the time on each rank's device."""
    p, n, stage = facts.parameters, layout.world_size, layout.zero_stage
    w = COMPUTE_BYTES[precision]
    items: list[MemoryItem] = []

    def item(name: str, size_bytes: float, rule: str) -> None:
        if size_bytes:
            items.append(MemoryItem(name=name, bytes=int(size_bytes), rule=rule))

    if stage == 3:
        whole = p.total - p.quantised
        if layout.offload_param == "none":
            item("weight shards", w * whole / n, f"{w} bytes × P {whole:,} / N {n}")
        bucket = zero_sizes(facts, recomputes=layout.recomputes).reduce_bucket_elements
        item("reduce bucket", w * bucket, f"{w} bytes × {bucket:,} elements")
        if layout.offload_optimizer == "none":
            item("gradient shards", w * p.trainable / n, f"{w} bytes × T / N {n}")
    if layout.offload_optimizer == "none":
        moments = MOMENT_BYTES[optim]
        item("master weights", 4 * p.trainable / n, f"4 bytes × T {p.trainable:,} / N {n}")
        item("optimizer states", moments * p.trainable / n, f"{moments:g} bytes × T / N {n}")
    elif stage < 3:
        item(
            "buffer to offload a gradient",
            w * p.largest_trained,
            f"{w} bytes × the largest parameter",
        )
    return items


def largest_share(counts: ParameterCount, ranks: int) -> float:
    """The largest part of the trained parameters whose gradients one rank keeps; at least 1 / N.

    ZeRO-1 and 2 cut the row of all matrices, and that of all vectors, into N equal parts; a tensor
    that lies across a cut is kept whole on both sides.
    """
    if not counts.trained_tensors:
        return 1 / ranks
    kept = [0] * ranks
    for row in (counts.trained_tensors, counts.trained_vectors):
        part = max(1, -(-sum(row) // (2 * ranks)) * 2)
        at = 0
        for numel in row:
            for rank in range(at // part, min((at + numel - 1) // part, ranks - 1) + 1):
                kept[rank] += numel
            at += numel
    return max(kept) / counts.trainable


def largest_group(counts: ParameterCount, ranks: int, elements: int) -> int:
    """The most of a rank's shard that ZeRO-3's optimizer goes over at once.

    A group takes one parameter's share after the other until it has `elements` of the rank's own
    (stage3.py, `_create_fp16_sub_groups`), so that the last one may take it beyond.
    """
    largest = 0
    for row in (counts.trained_tensors, counts.trained_vectors):
        group = 0
        for numel in row:
            group += -(-numel // ranks)
            largest = max(largest, group)
            group = group if group < elements else 0
    return largest or min(-(-counts.trainable // ranks), elements)


def per_phase_bytes(
    phase: str,
    facts: ModelFacts,
    layout: Layout,
    precision: Precision,
    optim: str,
    share: float,
    *,
    on_gpu: bool,
) -> list[MemoryItem]:
    """What is there in one part of a step only.

    Args:
        phase: `forward`, `backward` or `optimizer`.
        facts: the model.
        layout: its ZeRO stage is at least 1.
        precision: compute precision.
        optim: optimizer.
        share: below ZeRO-3 the `largest_share`.
        on_gpu: whether the optimizer goes over a whole shard at once, as on a GPU.
    """
    p, n, stage = facts.parameters, layout.world_size, layout.zero_stage
    w, kept = COMPUTE_BYTES[precision], p.trainable * share
    offloaded = layout.offload_optimizer != "none"
    accumulated = layout.gradient_accumulation_steps > 1
    items: list[MemoryItem] = []

    def item(name: str, size_bytes: float, rule: str) -> None:
        items.append(MemoryItem(name=name, bytes=int(size_bytes), rule=rule))

    if stage < 3 and accumulated and not offloaded and phase != "optimizer":
        item("accumulated gradient shards", w * kept, f"{w} bytes × T / N {n}")
    if phase == "optimizer" and not offloaded:
        group = p.trainable / n
        if stage == 3:
            most = zero_sizes(facts, recomputes=layout.recomputes).sub_group_elements
            group = largest_group(p, n, most)
        # The shard's gradients are flattened, then cast; the optimizer works on the cast ones.
        each = max(w + 4 if w < 4 else w, 4 + _optimizer_temporaries(optim, on_gpu=on_gpu))
        gradients = w * kept if stage < 3 else 0
        # Norms are taken in fp64, of one gradient (ZeRO-3: of its shard) after the other.
        norm = 8 * p.largest_trained / (n if stage == 3 else 1)
        item(
            "optimizer's work",
            max(each * group, norm) + gradients,
            f"{each:g} bytes × {group:,.0f} of a shard, or norms in fp64"
            + (f", beside {w} bytes × T / N" if gradients else ""),
        )
    return items


def _optimizer_temporaries(optim: str, *, on_gpu: bool) -> int:
    """Bytes a parameter that AdamW makes on the way: √v, and on a CPU its corrected copy too."""
    if optim != "adamw_torch":
        return 0  # fused kernels work in place
    return 4 if on_gpu else 8
