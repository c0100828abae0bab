"""Closed forms of model states on a device: weights, master weights and optimizer states.

P is all parameters, T the trainable ones, Q those held in 4 bits, N the ranks.
Sources: ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054, section 3) and DeepSpeed's documentation,
«Memory Requirements» (memory.rst); QLoRA (Dettmers et al. 2023, arXiv:2305.14314, section 3).
"""

from __future__ import annotations

from hpcft.core.records import Cluster, Layout, MemoryItem, Plan
from hpcft.core.units import GIB, format_bytes
from hpcft.methods import AnyMethod
from hpcft.methods.base import COMPUTE_BYTES
from hpcft.planning.inputs import PlanInputs
from hpcft.planning.learned_values import context_bytes, process_bytes

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

# Python, torch, transformers and DeepSpeed imported, as Slurm counts a rank: what a job requests.
PROCESS_BYTES = int(1.5 * GIB)
# The same as the kernel counts it (resident set); 0.65 GiB seen. As with a context, a profile's
# calibration replaces it.
RESIDENT_BYTES = 3 * GIB // 4
# What glibc's allocator keeps beside the tensors of a CPU: as much again for small ones, whose
# blocks it does not return to the kernel, and a share of all.
HEAP_BYTES = GIB
HEAP_SHARE = 0.05

# What the driver and CUDA's modules take before the first tensor; 0.3 to 0.6 GiB seen.
CUDA_CONTEXT_BYTES = GIB // 2
# NCCL's channels and buffers on each rank; 0.3 to 1 GiB seen, more with more peers.
COMMUNICATOR_BYTES = GIB // 2

# Names of the components of a rank's memory that are not tensors.
PROCESS_ITEM = "process"
CONTEXT_ITEM = "CUDA context"
COMMUNICATOR_ITEM = "communicator buffers"
FRAGMENTATION_ITEM = "fragmentation"


def persistent_bytes(inputs: PlanInputs, layout: Layout) -> int:
    """Returns a rank's weights, master weights and optimizer states: it never holds less.

    4 + 8 bytes a trained parameter without DeepSpeed, 2 + 4 + 8 with it in 16 bits, of which ZeRO
    divides 8 (stage 1), or all (stage 3) by N (Rajbhandari et al. 2020, arXiv:1910.02054).
    """
    p, n, stage = inputs.facts.parameters, layout.world_size, layout.zero_stage
    width = COMPUTE_BYTES[inputs.precision] if stage else 4
    each_frozen = inputs.method.frozen_bytes(inputs.precision, stage)
    frozen = each_frozen * (p.total - p.quantised - p.trainable)
    weights = p.quantised * four_bit_bytes(inputs.method) + frozen + width * p.trainable
    if layout.offload_param != "none":
        weights = 0
    states = 0.0
    if layout.offload_optimizer == "none":
        states = (MOMENT_BYTES[inputs.optim] + (4 if stage else 0)) * p.trainable
    return int(weights / (n if stage == 3 else 1) + states / (n if stage else 1))


def four_bit_bytes(method: AnyMethod) -> float:
    """Returns the bytes of a weight that the method holds in 4 bits, scales included."""
    return NF4_DOUBLE_BYTES if method.double_quantises else NF4_BYTES


def context_items(layout: Layout, cluster: Cluster) -> list[MemoryItem]:
    """Returns the CUDA context and the communicator buffers of a GPU process."""
    known = context_bytes(cluster)
    size = known or CUDA_CONTEXT_BYTES
    rule = _stated(size, calibrated=known is not None)
    items = [MemoryItem(name=CONTEXT_ITEM, bytes=size, rule=rule)]
    if layout.world_size > 1:
        items.append(MemoryItem(name=COMMUNICATOR_ITEM, bytes=COMMUNICATOR_BYTES, rule="0.5 GiB"))
    return items


def process_items(cluster: Cluster, tensor_bytes: int) -> list[MemoryItem]:
    """Returns what a rank on a CPU holds besides tensors: imported libraries, unused heap."""
    known = process_bytes(cluster)
    size = known or RESIDENT_BYTES
    rule = _stated(size, calibrated=known is not None)
    heap_rule = f"as much as the above, up to 1 GiB, and {HEAP_SHARE:.0%}"
    return [
        MemoryItem(name=FRAGMENTATION_ITEM, bytes=heap_bytes(tensor_bytes), rule=heap_rule),
        MemoryItem(name=PROCESS_ITEM, bytes=size, rule=rule),
    ]


def heap_bytes(tensor_bytes: int) -> int:
    """Returns what the C allocator of a rank on a CPU keeps beside its tensors."""
    return min(tensor_bytes, HEAP_BYTES) + int(HEAP_SHARE * tensor_bytes)


def tensor_bytes(plan: Plan) -> int:
    """Returns the bytes of tensors in a plan's peak."""
    others = (PROCESS_ITEM, CONTEXT_ITEM, COMMUNICATOR_ITEM, FRAGMENTATION_ITEM)
    return sum(item.bytes for item in plan.gpu_memory if item.name not in others)


def _stated(size_bytes: int, *, calibrated: bool) -> str:
    return format_bytes(size_bytes) + ", calibrated" * calibrated
