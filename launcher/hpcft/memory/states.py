"""Memory of model states: weights, gradients, optimizer, shards and buffers, per rank and node.

P is all parameters, T the trainable ones, Q those held in 4 bits, N the ranks, L the largest layer.
Sources: ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054, section 3) and DeepSpeed's documentation,
«Memory Requirements» (memory.rst); QLoRA (Dettmers et al. 2023, arXiv:2305.14314, section 3).
"""

from __future__ import annotations

from hpcft.methods import AnyMethod
from hpcft.methods.base import COMPUTE_BYTES
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

# Buffers between host and NVMe; DeepSpeed's default (runtime/zero/offload_config.py).
NVME_BUFFERS = 5

# The C++ compiler on one of torch's extension headers, as Slurm counts the job step.
COMPILER_BYTES = GIB


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
    frozen, frozen_width = _frozen(facts), method.frozen_bytes(precision, stage)
    # Without DeepSpeed trained weights are fp32 and autocast casts them; DeepSpeed casts the model
    # (adapters too, which PEFT had made fp32) and keeps an fp32 master copy of what is trained.
    weight_width = width if stage else 4
    if layout.offload_param == "none":
        item(
            "frozen weights",
            frozen_width * frozen / _over(stage >= 3, n),
            f"{frozen_width} bytes × (P − Q − T) {frozen:,}" + _by(stage >= 3, n),
        )
        item(
            "trained weights",
            weight_width * p.trainable / _over(stage >= 3, n),
            f"{weight_width} bytes × T {p.trainable:,}" + _by(stage >= 3, n),
        )
    if stage == 0 and precision != "fp32":
        # The forward pass's casts are kept for the backward pass: 4 + 2 bytes a weight, 18 in all
        # (Hugging Face, «Anatomy of model's memory»).
        item("autocast copies", width * p.trainable, f"{width} bytes × T")
    # -- gradients; ZeRO-3's are counted once, with the fp32 states (18 bytes in memory.rst)
    if stage < 2 or (stage == 2 and layout.offload_optimizer == "none"):
        item(
            "gradients",
            weight_width * p.trainable / _over(stage >= 2, n),
            f"{weight_width} bytes × T" + _by(stage >= 2, n),
        )
    if stage == 0 and n > 1:
        # «The saved memory size will be equal to the total gradients size» (PyTorch on
        # DistributedDataParallel's gradient_as_bucket_view, which the Trainer leaves off).
        item("gradient buckets", 4 * p.trainable, "4 bytes × T (all-reduce)")
    # -- optimizer and master copy
    if layout.offload_optimizer == "none":
        moments = MOMENT_BYTES[optim]
        item(
            "optimizer moments",
            moments * p.trainable / _over(stage >= 1, n),
            f"{moments:g} bytes × T" + _by(stage >= 1, n),
        )
        if stage:
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


def swap_buffer_elements(facts: ModelFacts, layout: Layout) -> int:
    """Elements of a buffer of parameters on NVMe: a rank's share of a layer, at least 1e8.

    1e8 is DeepSpeed's default (runtime/zero/offload_config.py), and it asserts that a share fits.
    """
    return max(100_000_000, -(-facts.parameters.largest_layer // layout.world_size))


def _frozen(facts: ModelFacts) -> int:
    """Parameters that are neither trained nor held in 4 bits."""
    p = facts.parameters
    return p.total - p.quantised - p.trainable


def loading_bytes(
    facts: ModelFacts, method: AnyMethod, layout: Layout, precision: Precision, file_bytes: int
) -> int:
    """What a rank holds in host memory while it loads for a GPU: a file's worth, or all weights.

    Below ZeRO-3 `from_pretrained` builds the whole model in host memory before it is moved.
    """
    if method.loads_on_device or layout.zero_stage == 3:
        return file_bytes
    width = COMPUTE_BYTES[precision] if layout.zero_stage or method.adapter else 4
    return max(file_bytes, width * facts.parameters.total)


def host_states(
    facts: ModelFacts, method: AnyMethod, layout: Layout, precision: Precision, *, load_bytes: int
) -> list[MemoryItem]:
    """Host memory per node: the processes, loading, and what is offloaded.

    Offloaded states take 1.5 × 16 bytes (optimizer) or 1.5 × 18 bytes (parameters too) for each
    parameter, over the nodes; DeepSpeed's memory.rst gives the 1.5 for buffers. Frozen parameters
    have no states and count by their own width.
    """
    p, ranks = facts.parameters, layout.ranks_per_node
    items = [
        MemoryItem(name="processes", bytes=PROCESS_BYTES * ranks, rule=f"1.5 GiB × {ranks} ranks"),
        MemoryItem(name="loading", bytes=load_bytes * ranks, rule=f"weights read × {ranks} ranks"),
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
        items.append(
            MemoryItem(
                name="offloaded states",
                bytes=int(1.5 * each * p.trainable / layout.nodes),
                rule=f"1.5 × {each} bytes × T / {layout.nodes} nodes",
            )
        )
    if layout.offload_param == "nvme":
        buffers = NVME_BUFFERS * COMPUTE_BYTES[precision] * swap_buffer_elements(facts, layout)
        items.append(
            MemoryItem(
                name="NVMe buffers",
                bytes=ranks * buffers,
                rule=f"{NVME_BUFFERS} × {COMPUTE_BYTES[precision]} bytes × buffer × {ranks} ranks",
            )
        )
    frozen, width = _frozen(facts), method.frozen_bytes(precision, layout.zero_stage)
    if layout.offload_param == "cpu" and frozen:
        items.append(
            MemoryItem(
                name="offloaded frozen weights",
                bytes=int(1.5 * width * frozen / layout.nodes),
                rule=f"1.5 × {width} bytes × (P − Q − T) / {layout.nodes} nodes",
            )
        )
    return items


def _over(sharded: bool, n: int) -> int:
    return n if sharded else 1


def _by(sharded: bool, n: int) -> str:
    return f" / N {n}" if sharded and n > 1 else ""
