"""Closed forms: weights and states that lie on a device throughout, and memory of the host.

P is all parameters, T the trainable ones, Q those held in 4 bits, N the ranks, L the largest layer.
Sources: ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054, section 3) and DeepSpeed's documentation,
«Memory Requirements» (memory.rst); QLoRA (Dettmers et al. 2023, arXiv:2305.14314, section 3).
"""

from __future__ import annotations

from hpcft.core.records import Calibration, Layout, MemoryItem, ModelFacts, Plan, Precision
from hpcft.core.units import GIB, format_bytes
from hpcft.methods import AnyMethod
from hpcft.methods.base import COMPUTE_BYTES

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

# Python, torch, transformers and DeepSpeed imported, as Slurm counts a rank. As with a context, a
# profile's calibration replaces it.
PROCESS_BYTES = int(1.5 * GIB)

# Buffers between host and NVMe; DeepSpeed's default (runtime/zero/offload_config.py).
NVME_BUFFERS = 5

# What a forked data-loading process has for itself: 13 to 40 MiB seen with batches of 32 × 200
# tokens; the libraries are shared with its rank, the examples with the page cache.
WORKER_BYTES = 64 * 2**20

# The C++ compiler on one of torch's extension headers, as Slurm counts the job step.
COMPILER_BYTES = GIB

# What the driver and CUDA's modules take before the first tensor; 0.3 to 0.6 GiB seen.
CUDA_CONTEXT_BYTES = GIB // 2
# NCCL's channels and buffers on each rank; 0.3 to 1 GiB seen, more with more peers.
COMMUNICATOR_BYTES = GIB // 2

# Components of a rank's memory that are not tensors.
PROCESS, CONTEXT, FRAGMENTATION = "process", "CUDA context", "fragmentation"
COMMUNICATOR = "communicator buffers"


def persistent_bytes(
    facts: ModelFacts, method: AnyMethod, layout: Layout, precision: Precision, optim: str
) -> int:
    """Weights, master weights and optimizer states of a rank: less than this it never holds.

    4 + 8 bytes a trained parameter without DeepSpeed, 2 + 4 + 8 with it in 16 bits, of which ZeRO
    divides 8 (stage 1), or all (stage 3) by N (Rajbhandari et al. 2020, arXiv:1910.02054).
    """
    p, n, stage = facts.parameters, layout.world_size, layout.zero_stage
    width = COMPUTE_BYTES[precision] if stage else 4
    each = four_bit_bytes(method)
    frozen = method.frozen_bytes(precision, stage) * (p.total - p.quantised - p.trainable)
    weights = p.quantised * each + frozen + width * p.trainable
    if layout.offload_param != "none":
        weights = 0
    states = 0.0
    if layout.offload_optimizer == "none":
        states = (MOMENT_BYTES[optim] + (4 if stage else 0)) * p.trainable
    return int(weights / (n if stage == 3 else 1) + states / (n if stage else 1))


def four_bit_bytes(method: AnyMethod) -> float:
    """Bytes of a weight that the method holds in 4 bits, scales included."""
    return NF4_DOUBLE_BYTES if method.double_quantises else NF4_BYTES


def context_items(layout: Layout, known: Calibration) -> list[MemoryItem]:
    """What a GPU process holds besides tensors."""
    size = known.context_bytes or CUDA_CONTEXT_BYTES
    rule = _stated(size, calibrated=known.context_bytes is not None)
    items = [MemoryItem(name=CONTEXT, bytes=size, rule=rule)]
    if layout.world_size > 1:
        items.append(MemoryItem(name=COMMUNICATOR, bytes=COMMUNICATOR_BYTES, rule="0.5 GiB"))
    return items


def process_item(known: Calibration) -> MemoryItem:
    """What a rank on a CPU holds besides tensors."""
    size = known.process_bytes or PROCESS_BYTES
    rule = _stated(size, calibrated=known.process_bytes is not None)
    return MemoryItem(name=PROCESS, bytes=size, rule=rule)


def tensor_bytes(plan: Plan) -> int:
    """The tensors of a plan's peak."""
    others = (PROCESS, CONTEXT, FRAGMENTATION, COMMUNICATOR)
    return sum(item.bytes for item in plan.gpu_memory if item.name not in others)


def _stated(size_bytes: int, *, calibrated: bool) -> str:
    return format_bytes(size_bytes) + ", calibrated" * calibrated


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
    width = COMPUTE_BYTES[precision] if layout.zero_stage or method.frozen_base else 4
    return max(file_bytes, width * facts.parameters.total)


def host_memory_items(
    facts: ModelFacts,
    method: AnyMethod,
    layout: Layout,
    precision: Precision,
    *,
    load_bytes: int,
    workers: int = 0,
    known: Calibration | None = None,
) -> list[MemoryItem]:
    """Host memory per node: the processes, loading, data workers, and what is offloaded.

    Loading counts beside offloaded states, although it is over when they are there: they are
    pinned, so that the page cache of what is read after them (weights, data) cannot take their
    place.

    Offloaded states take 1.5 × 16 bytes (optimizer) or 1.5 × 18 bytes (parameters too) for each
    parameter, over the nodes; DeepSpeed's memory.rst gives the 1.5 for buffers. Frozen parameters
    have no states and count by their own width.
    """
    p, ranks = facts.parameters, layout.ranks_per_node
    process = process_item(known or Calibration())
    items = [
        MemoryItem(
            name="processes", bytes=process.bytes * ranks, rule=f"{process.rule} × {ranks} ranks"
        ),
        MemoryItem(name="loading", bytes=load_bytes * ranks, rule=f"weights read × {ranks} ranks"),
    ]
    if layout.zero_stage == 3:
        # Rank 0 collects whole weights to save them; nothing is being loaded then.
        whole = COMPUTE_BYTES[precision] * (p.trainable if method.adapter else p.total)
        if whole > load_bytes * ranks:
            rule = f"{COMPUTE_BYTES[precision]} bytes × P, on rank 0's node"
            items[-1] = MemoryItem(name="saving", bytes=whole, rule=rule)
    if workers:
        items.append(
            MemoryItem(
                name="data workers",
                bytes=WORKER_BYTES * workers * ranks,
                rule=f"{format_bytes(WORKER_BYTES)} × {workers} workers × {ranks} ranks",
            )
        )
    if layout.zero_stage:
        items.append(
            MemoryItem(
                name="compiling operators",
                bytes=COMPILER_BYTES,
                rule="1 GiB where DeepSpeed's operators are not built yet",
            )
        )
    each = 18 if layout.offload_param == "cpu" else 16 if layout.offload_optimizer == "cpu" else 0
    if each and p.trainable:
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
