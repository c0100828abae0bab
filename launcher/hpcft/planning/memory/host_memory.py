"""Predicts the host memory of a node in closed forms: processes, loading, offloaded states.

P is all parameters, T the trainable ones, Q those held in 4 bits, N the ranks.
Source: DeepSpeed's documentation, «Memory Requirements» (memory.rst).
"""

from __future__ import annotations

from collections.abc import Iterator

from hpcft.core.records import Layout, MemoryItem, ModelFacts
from hpcft.core.units import GIB, format_bytes
from hpcft.methods.base import COMPUTE_BYTES
from hpcft.planning.inputs import PlanInputs
from hpcft.planning.learned_values import process_bytes
from hpcft.planning.memory.model_states import PROCESS_BYTES, heap_bytes

# Buffers between host and NVMe; DeepSpeed's default (runtime/zero/offload_config.py).
NVME_BUFFERS = 5

# What a forked data-loading process has for itself: 13 to 40 MiB seen with batches of 32 × 200
# tokens; the libraries are shared with its rank, the examples with the page cache.
WORKER_BYTES = 64 * 2**20

# The C++ compiler on one of torch's extension headers, as Slurm counts the job step.
COMPILER_BYTES = GIB


def host_memory_items(inputs: PlanInputs, layout: Layout, tensor_bytes: int) -> list[MemoryItem]:
    """Returns the host memory of a node by component.

    Args:
        inputs: what is planned.
        layout: how the run is laid out.
        tensor_bytes: the tensors of a rank, which lie in host memory where it computes on a CPU.
    """
    items = [_processes(inputs, layout), _loading_or_saving(inputs, layout)]
    items += [*_data_workers(inputs, layout), *_compiling(layout), *_offloaded(inputs, layout)]
    if not inputs.on_gpu:
        ranks = layout.ranks_per_node
        rule = f"{ranks} ranks × predicted peak without the process"
        size = ranks * (tensor_bytes + heap_bytes(tensor_bytes))
        items.append(MemoryItem(name="training on the CPU", bytes=size, rule=rule))
    return items


def loading_bytes(inputs: PlanInputs, layout: Layout) -> int:
    """Returns the host memory of a rank while it loads: the largest file, or all weights.

    Below ZeRO-3 `from_pretrained` builds the whole model in host memory before it is moved to the
    GPU. On a CPU it stays there and counts as a tensor.
    """
    method = inputs.method
    if not inputs.on_gpu or method.loads_on_device or layout.zero_stage == 3:
        return inputs.load_bytes
    in_compute_type = layout.zero_stage or method.freezes_base
    width = COMPUTE_BYTES[inputs.precision] if in_compute_type else 4
    return max(inputs.load_bytes, width * inputs.facts.parameters.total)


def swap_buffer_elements(facts: ModelFacts, layout: Layout) -> int:
    """Returns the elements of a buffer for parameters on NVMe.

    A buffer holds a rank's share of the largest layer, which DeepSpeed asserts, and at least 1e8
    elements, its default (runtime/zero/offload_config.py).
    """
    return max(100_000_000, -(-facts.parameters.largest_layer // layout.world_size))


def _processes(inputs: PlanInputs, layout: Layout) -> MemoryItem:
    ranks = layout.ranks_per_node
    each = max(PROCESS_BYTES, process_bytes(inputs.cluster) or 0)
    rule = f"{format_bytes(each)} × {ranks} ranks"
    return MemoryItem(name="processes", bytes=each * ranks, rule=rule)


def _loading_or_saving(inputs: PlanInputs, layout: Layout) -> MemoryItem:
    """Returns the larger of what loading takes and, under ZeRO-3, what saving takes.

    Loading counts in addition to offloaded states, although it ends before they exist: they are
    pinned, so that the page cache of what is read after them (weights, data) cannot take their
    place.
    """
    p, ranks = inputs.facts.parameters, layout.ranks_per_node
    loading = loading_bytes(inputs, layout) * ranks
    # Under ZeRO-3 rank 0 collects whole weights to save them; nothing is being loaded then.
    width = COMPUTE_BYTES[inputs.precision]
    saving = width * (p.trainable if inputs.method.saves_adapter else p.total)
    if layout.zero_stage == 3 and saving > loading:
        rule = f"{width} bytes × P, on rank 0's node"
        return MemoryItem(name="saving", bytes=saving, rule=rule)
    return MemoryItem(name="loading", bytes=loading, rule=f"weights read × {ranks} ranks")


def _data_workers(inputs: PlanInputs, layout: Layout) -> Iterator[MemoryItem]:
    workers, ranks = inputs.recipe.train.dataloader_num_workers, layout.ranks_per_node
    if workers:
        rule = f"{format_bytes(WORKER_BYTES)} × {workers} workers × {ranks} ranks"
        size = WORKER_BYTES * workers * ranks
        yield MemoryItem(name="data workers", bytes=size, rule=rule)


def _compiling(layout: Layout) -> Iterator[MemoryItem]:
    if layout.zero_stage:
        rule = "1 GiB where DeepSpeed's operators are not built yet"
        yield MemoryItem(name="compiling operators", bytes=COMPILER_BYTES, rule=rule)


def _offloaded(inputs: PlanInputs, layout: Layout) -> Iterator[MemoryItem]:
    """Yields what offloading keeps in host memory.

    Offloaded states take 1.5 × 16 bytes (optimizer) or 1.5 × 18 bytes (parameters too) for each
    parameter, over the nodes; DeepSpeed's memory.rst gives the 1.5 for buffers. Frozen parameters
    have no states and count by their own width.
    """
    p, nodes, ranks = inputs.facts.parameters, layout.nodes, layout.ranks_per_node
    each = 18 if layout.offload_param == "cpu" else 16 if layout.offload_optimizer == "cpu" else 0
    if each and p.trainable:
        rule = f"1.5 × {each} bytes × T / {nodes} nodes"
        size = int(1.5 * each * p.trainable / nodes)
        yield MemoryItem(name="offloaded states", bytes=size, rule=rule)
    if layout.offload_param == "nvme":
        width = COMPUTE_BYTES[inputs.precision]
        buffers = NVME_BUFFERS * width * swap_buffer_elements(inputs.facts, layout)
        rule = f"{NVME_BUFFERS} × {width} bytes × buffer × {ranks} ranks"
        yield MemoryItem(name="NVMe buffers", bytes=ranks * buffers, rule=rule)
    frozen = p.total - p.quantised - p.trainable
    if layout.offload_param == "cpu" and frozen:
        width = inputs.method.frozen_bytes(inputs.precision, layout.zero_stage)
        rule = f"1.5 × {width} bytes × (P − Q − T) / {nodes} nodes"
        size = int(1.5 * width * frozen / nodes)
        yield MemoryItem(name="offloaded frozen weights", bytes=size, rule=rule)
