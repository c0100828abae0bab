"""Memory of model states: weights, gradients, optimizer, shards and buffers, per rank and node.

P is all parameters, T the trainable ones, Q those held in 4 bits, N the ranks, L the largest layer.
Sources: ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054, section 3) and DeepSpeed's documentation,
«Memory Requirements» (memory.rst); QLoRA (Dettmers et al. 2023, arXiv:2305.14314, section 3).
"""

from __future__ import annotations

from hpcft.methods import AnyMethod
from hpcft.records import Layout, MemoryItem, ModelFacts, Precision
from hpcft.units import GIB

# NF4: 4 bits a weight and one fp32 scale for 64 of them, 0.5 + 4/64; with double quantisation the
# scales take 8 bits and one fp32 second scale for 256 of them, 0.5 + 1/64 + 4/(64·256).
NF4_BYTES = 0.5 + 4 / 64
NF4_DOUBLE_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)

# Adam's two moments, in bytes for each trained parameter; the 8-bit ones carry a scale per block.
MOMENT_BYTES = {
    "adamw_torch": 8.0,
    "adamw_torch_fused": 8.0,
    "paged_adamw_32bit": 8.0,
    "adamw_bnb_8bit": 2.0 + 2 * 4 / 256,
    "paged_adamw_8bit": 2.0 + 2 * 4 / 256,
}

# CUDA context, cuBLAS workspaces and the communicator's buffers: 0.5 to 2 GiB seen in practice.
CUDA_CONTEXT_BYTES = int(1.0 * GIB)
# Python, torch, transformers and DeepSpeed imported, as Slurm counts a rank.
PROCESS_BYTES = int(1.5 * GIB)

# The C++ compiler on one of torch's extension headers, as Slurm counts the job step.
COMPILER_BYTES = GIB

COMPUTE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


def model_states(
    facts: ModelFacts, method: AnyMethod, layout: Layout, precision: Precision, optim: str
) -> list[MemoryItem]:
    """Memory per rank of weights, gradients and optimizer under the layout."""
    p, n = facts.parameters, layout.world_size
    stage = layout.zero_stage
    width = COMPUTE_BYTES[precision]
    items: list[MemoryItem] = []

    def item(name: str, size_bytes: float, rule: str) -> None:
        if size_bytes:
            items.append(MemoryItem(name=name, bytes=int(size_bytes), rule=rule))

    # -- weights
    if p.quantised:
        each = NF4_DOUBLE_BYTES if getattr(method, "bnb_4bit_use_double_quant", True) else NF4_BYTES
        item("4-bit weights", p.quantised * each, f"{each:.3f} bytes × Q {p.quantised:,}")
    frozen_16bit = p.total - p.quantised - p.trainable if method.adapter else 0
    item(
        "frozen weights",
        width * frozen_16bit / _over(stage >= 3, n),
        f"{width} bytes × (P − Q − T) {frozen_16bit:,}" + _by(stage >= 3, n),
    )
    mixed = precision != "fp32"
    master_is_model = stage == 0 or method.adapter  # autocast over fp32 weights, no second copy
    weight_width = 4 if master_is_model else width
    shard_w = stage >= 3 and layout.offload_param == "none"
    if layout.offload_param == "none":
        item(
            "trained weights",
            weight_width * p.trainable / _over(shard_w, n),
            f"{weight_width} bytes × T {p.trainable:,}" + _by(shard_w, n),
        )
    if mixed and stage == 0 and not method.adapter:
        item("autocast copies", width * p.largest_layer * 2, f"{width} bytes × 2 L (weight cache)")
    # -- gradients
    if not (stage >= 2 and layout.offload_optimizer != "none"):
        item(
            "gradients",
            weight_width * p.trainable / _over(stage >= 2, n),
            f"{weight_width} bytes × T" + _by(stage >= 2, n),
        )
    # -- optimizer and master copy
    if layout.offload_optimizer == "none":
        moments = MOMENT_BYTES[optim]
        item(
            "optimizer moments",
            moments * p.trainable / _over(stage >= 1, n),
            f"{moments:g} bytes × T" + _by(stage >= 1, n),
        )
        if not master_is_model:
            # fp32 weight and fp32 gradient: 18 = 2 + 4 + 4 + 8 in DeepSpeed's memory.rst
            item(
                "fp32 master weights and gradients",
                8 * p.trainable / _over(True, n),
                "8 bytes × T" + _by(True, n),
            )
    # -- ZeRO's working memory
    if stage >= 3:
        gathered = 2 * p.largest_layer
        item("gathered parameters", width * gathered, f"{width} bytes × 2 L {p.largest_layer:,}")
    if stage >= 1:
        bucket = reduce_bucket_elements(facts)
        item("reduce bucket", 2 * width * bucket, f"2 × {width} bytes × {bucket:,} elements")
    return items


def reduce_bucket_elements(facts: ModelFacts) -> int:
    """ZeRO's bucket size in elements: hidden_size², as Transformers' `auto`, within 1e6 and 5e8."""
    return int(min(max(facts.hidden_size**2, 1_000_000), 500_000_000))


def host_states(facts: ModelFacts, layout: Layout, *, load_bytes: int) -> list[MemoryItem]:
    """Host memory per node: the processes, loading, and what is offloaded.

    Offloaded states take 1.5 × 16 bytes (optimizer) or 1.5 × 18 bytes (parameters too) for each
    parameter, over the nodes; DeepSpeed's memory.rst gives the 1.5 for buffers.
    """
    p, ranks = facts.parameters, layout.ranks_per_node
    items = [
        MemoryItem(name="processes", bytes=PROCESS_BYTES * ranks, rule=f"1.5 GiB × {ranks} ranks"),
        MemoryItem(
            name="loading", bytes=load_bytes * ranks, rule=f"one weight file × {ranks} ranks"
        ),
    ]
    if layout.zero_stage:
        items.append(
            MemoryItem(
                name="compiling operators",
                bytes=COMPILER_BYTES,
                rule="1 GiB where DeepSpeed's operators are not built yet",
            )
        )
    each = 18 if layout.offload_param == "cpu" else 16 if layout.offload_optimizer == "cpu" else 0
    if each:
        size = int(1.5 * each * p.trainable / layout.nodes)
        items.append(
            MemoryItem(
                name="offloaded states",
                bytes=size,
                rule=f"1.5 × {each} bytes × T / {layout.nodes} nodes",
            )
        )
    return items


def _over(sharded: bool, n: int) -> int:
    return n if sharded else 1


def _by(sharded: bool, n: int) -> str:
    return f" / N {n}" if sharded and n > 1 else ""
