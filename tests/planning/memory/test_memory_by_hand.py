"""Closed forms of memory: states, shards, offloading and loading, each computed by hand."""

from __future__ import annotations

from typing import Any

import pytest

from builders import BILLION, cluster, facts, layout, plan_of, recipe
from hpcft.core.units import GIB
from hpcft.planning.memory import rank_memory, zero_memory
from hpcft.planning.memory.model_states import host_memory_items, loading_bytes, persistent_bytes

# ---------------------------------------------------------------- model states by hand


@pytest.mark.parametrize(
    ("stage", "ranks", "precision", "bytes_each"),
    [
        (0, 1, "fp32", 4 + 8),  # weight and two moments; gradients come and go
        (0, 1, "bf16", 4 + 8),  # autocast leaves the weight as it is
        (0, 4, "bf16", 4 + 8),
        (1, 1, "bf16", 2 + 4 + 8),
        (1, 4, "bf16", 2 + 12 / 4),  # master weight and moments are sharded
        (2, 4, "bf16", 2 + 12 / 4),
        (3, 4, "fp16", 14 / 4),
        (3, 8, "fp32", 16 / 8),
    ],
)
def test_what_lasts_by_hand(stage: int, ranks: int, precision: Any, bytes_each: float) -> None:
    method = recipe().method
    least = persistent_bytes(facts(), method, layout(stage, ranks), precision, "adamw_torch")
    assert least == pytest.approx(bytes_each * BILLION, rel=1e-9)


@pytest.mark.parametrize(
    ("stage", "changes", "bytes_each"),
    [
        (1, {}, 12 / 4),
        (3, {}, (2 + 2 + 4 + 8) / 4),  # weights, gradients, master weights, moments
        (2, {"offload_optimizer": "cpu"}, 0.2),  # a buffer as large as the largest tensor
        (3, {"offload_optimizer": "cpu"}, 2 / 4),
        (3, {"offload_optimizer": "cpu", "offload_param": "cpu"}, 0),
        (3, {"offload_optimizer": "nvme"}, 2 / 4),
    ],
)
def test_shards_by_hand(stage: int, changes: dict[str, str], bytes_each: float) -> None:
    """DeepSpeed's memory.rst: 4L + 2P/N, 4L, 4L + 16P/N."""
    items = zero_memory.persistent_items(
        facts(), layout(stage, 4, **changes), "bf16", "adamw_torch"
    )
    shards = sum(item.bytes for item in items if item.name != "reduce bucket")
    assert shards == pytest.approx(bytes_each * BILLION)
    buckets = [item.bytes for item in items if item.name == "reduce bucket"]
    assert buckets == ([2 * 2048**2] if stage == 3 else [])


@pytest.mark.parametrize(
    ("stage", "precision", "optim", "on_gpu", "bytes_each"),
    [
        # flat fp32 gradients, sqrt and quotient, and the shard that they were gathered in
        (2, "fp32", "adamw_torch", False, 4 + 8 + 4),
        (2, "bf16", "adamw_torch", False, 4 + 8 + 2),
        (2, "bf16", "adamw_torch", True, 4 + 4 + 2),  # over all at once: sqrt alone
        (2, "bf16", "adamw_torch_fused", True, 2 + 4 + 2),  # the cast is the most
        (3, "bf16", "adamw_torch", False, (4 + 8) * 0.4),  # 1e8 of 2.5e8 elements at once
    ],
)
def test_the_optimizers_work_by_hand(
    stage: int, precision: Any, optim: str, on_gpu: bool, bytes_each: float
) -> None:
    (item,) = zero_memory.per_phase_bytes(
        "optimizer", facts(), layout(stage, 4), precision, optim, 1 / 4, on_gpu=on_gpu
    )
    assert item.bytes == pytest.approx(bytes_each * BILLION / 4)


@pytest.mark.parametrize(
    ("stage", "optimizer", "param", "host_each"),
    [(2, "cpu", "none", 16), (3, "cpu", "none", 16), (3, "cpu", "cpu", 18), (3, "nvme", "none", 0)],
)
def test_offloading_by_hand(stage: int, optimizer: str, param: str, host_each: float) -> None:
    """DeepSpeed's memory.rst: 1.5 × 16 or 18 bytes over the nodes."""
    laid = layout(stage, 4, offload_optimizer=optimizer, offload_param=param)
    method = recipe().method
    host = {i.name: i.bytes for i in host_memory_items(facts(), method, laid, "bf16", load_bytes=0)}
    assert host.get("offloaded states", 0) == pytest.approx(1.5 * host_each * BILLION)


def test_rank_0_collects_whole_weights_to_save_them() -> None:
    method, laid = recipe().method, layout(3, 4)
    host = {
        i.name: i.bytes for i in host_memory_items(facts(), method, laid, "bf16", load_bytes=10)
    }
    assert host["saving"] == 2 * BILLION
    assert "loading" not in host, "which is over by then"


def test_data_workers_are_paid_for_each_rank() -> None:
    items = host_memory_items(
        facts(), recipe().method, layout(3, 4), "bf16", load_bytes=10, workers=2
    )
    host = {item.name: item.bytes for item in items}
    assert host["data workers"] == 4 * 2 * 64 * 2**20
    assert host["saving"] == 2 * BILLION


@pytest.mark.parametrize(("double", "each"), [(True, 0.516), (False, 0.563)])
def test_qlora_by_hand(double: bool, each: float) -> None:
    """A base of 7 billion: 6 in 4 bits, the rest as fp32 (PEFT's preparation), adapters trained."""
    method = recipe(method={"name": "qlora", "bnb_4bit_use_double_quant": double}).method
    counts = facts(7_020_000_000, trainable=20_000_000, quantised=6_000_000_000)
    one = persistent_bytes(counts, method, layout(0), "bf16", "adamw_torch")
    assert one == pytest.approx(each * 6e9 + 4e9 + 12 * 20e6, rel=1e-3)
    paged = persistent_bytes(counts, method, layout(0), "bf16", "paged_adamw_8bit")
    assert one - paged == pytest.approx(6 * 20e6, rel=0.01)
    sharded = persistent_bytes(counts, method, layout(2, 4), "bf16", "adamw_torch")
    assert sharded == pytest.approx(each * 6e9 + 2e9 + (2 + 12 / 4) * 20e6, rel=1e-3)


def test_lora_under_zero3_moves_the_frozen_weights_too() -> None:
    method = recipe(method={"name": "lora"}).method
    counts = facts(8 * BILLION, trainable=10_000_000)
    items = {
        i.name: i.bytes
        for i in zero_memory.persistent_items(counts, layout(3, 4), "bf16", "adamw_torch")
    }
    assert items["weight shards"] == 2 * 8 * BILLION // 4
    laid = layout(3, 4, offload_optimizer="cpu", offload_param="cpu")
    moved = {i.name for i in zero_memory.persistent_items(counts, laid, "bf16", "adamw_torch")}
    assert "weight shards" not in moved
    host = {i.name: i.bytes for i in host_memory_items(counts, method, laid, "bf16", load_bytes=0)}
    assert host["offloaded frozen weights"] == 1.5 * 2 * (8 * BILLION - 10_000_000)


@pytest.mark.parametrize(
    ("method", "stage", "precision", "bytes_each"),
    [("full", 0, "bf16", 4), ("full", 2, "bf16", 2), ("lora", 0, "bf16", 2), ("full", 3, "bf16", 0),
     ("qlora", 0, "bf16", 0)],
)  # fmt: skip
def test_loading_passes_through_host_memory_as_a_whole(
    method: str, stage: int, precision: Any, bytes_each: int
) -> None:
    """Below ZeRO-3 every rank builds the model in host memory; 4-bit weights go to the GPU."""
    by = recipe(method={"name": method}).method
    held = loading_bytes(facts(), by, layout(stage, 2), precision, 100)
    assert held == max(100, bytes_each * BILLION)


def test_a_plan_counts_what_is_beside_the_tensors() -> None:
    """On a GPU: fragments, context, NCCL, and the model on its way through host memory."""
    two = recipe(resources={"nodes": 1, "gpus_per_node": 2, "zero_stage": 0})
    made = plan_of(two, cluster("a100-80"), facts(), load_bytes=10)
    rank = {item.name: item.bytes for item in made.gpu_memory}
    outside = ("fragmentation", "CUDA context", "communicator buffers")
    tensors = sum(size for name, size in rank.items() if name not in outside)
    assert rank["fragmentation"] == int(rank_memory.FRAGMENTATION * tensors)
    assert rank["CUDA context"] == rank["communicator buffers"] == GIB // 2
    assert rank["gradient buckets"] == 4 * BILLION
    host = {item.name: item.bytes for item in made.host_memory}
    assert host["loading"] == 2 * 4 * BILLION
    assert host["processes"] == 2 * 1.5 * GIB
    assert made.mem_mib == int(1.25 * sum(host.values()) / 2**20)


def test_on_a_cpu_the_ranks_share_the_nodes_memory() -> None:
    two = recipe(resources={"nodes": 1, "gpus_per_node": 2, "zero_stage": 0})
    made = plan_of(two, cluster("cpu"), facts(), load_bytes=10)
    host = {item.name: item.bytes for item in made.host_memory}
    process = 3 * GIB // 2
    assert host["training on the CPU"] == 2 * (made.gpu_peak_bytes - process)
    assert host["loading"] == 20
    assert made.gpu_capacity_bytes == 120 * GIB
