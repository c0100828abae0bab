"""A stated allowance for activations, logits and fragmentation.

It is a closed form for one shape of Transformer, not yet a trace of the real module. B is the
micro-batch, S the sequence in tokens, H the width, F the feed-forward width, L the layers, V the
outputs per position.
"""

from __future__ import annotations

from hpcft.methods.base import COMPUTE_BYTES
from hpcft.records import Layout, MemoryItem, ModelFacts, Precision

# Allocated blocks do not tile the device: what is lost between them, as a share of all else.
FRAGMENTATION = 0.05


def activation_items(
    facts: ModelFacts, layout: Layout, precision: Precision, sequence_tokens: int, *, sdpa: bool
) -> list[MemoryItem]:
    """Memory per rank that a training step holds for its backward pass.

    Korthikanti et al. 2022 (arXiv:2205.05198, equation 1) count 34·S·B·H + 5·a·S²·B bytes a layer
    with 16-bit activations and F = 4H; of the 34, 19 are MLP: 16 of width 4H, written here as 4·F.
    A memory-efficient attention does not keep the S² term. With checkpointing a layer keeps its
    input, 2·S·B·H, and one layer at a time is recomputed.
    """
    b, s = layout.per_device_train_batch_size, sequence_tokens
    h, f, layers = facts.hidden_size, facts.intermediate_size, facts.layers
    scale = COMPUTE_BYTES[precision] / 2
    square = 0 if sdpa else 5 * facts.attention_heads * s * s * b
    one_layer = scale * (b * s * (18 * h + 4 * f) + square)
    if layout.gradient_checkpointing:
        kept = scale * 2 * b * s * h * layers + one_layer
        rule = "2·B·S·H·L + one layer"
    else:
        kept = one_layer * layers
        rule = "B·S·(18·H + 4·F)·L" + ("" if sdpa else " + 5·a·B·S²·L")
    positions = b * s if facts.logits_positions == "tokens" else b
    width = COMPUTE_BYTES[precision]
    logits = positions * facts.logits_width * (width + 4 + 4)
    return [
        MemoryItem(name="activations", bytes=int(kept), rule=f"{rule}, B {b}, S {s:,}"),
        MemoryItem(
            name="logits and loss",
            bytes=int(logits),
            rule=f"({width} + 4 + 4) bytes × {positions:,} × V {facts.logits_width:,}",
        ),
    ]


def fragmentation(items: list[MemoryItem]) -> MemoryItem:
    """What the allocator loses between blocks."""
    size = int(FRAGMENTATION * sum(item.bytes for item in items))
    return MemoryItem(name="fragmentation", bytes=size, rule=f"{FRAGMENTATION:.0%} of the above")
