"""Tests closed forms of memory by hand: states, shards, offloading and loading."""

from __future__ import annotations

from typing import Any

import pytest

from builders import BILLION, cluster, facts, layout, plan_inputs, plan_of, recipe
from hpcft.core.records import Layout, ModelFacts
from hpcft.core.units import GIB
from hpcft.planning.inputs import PlanInputs
from hpcft.planning.memory import rank_memory, zero_memory
from hpcft.planning.memory.host_memory import host_memory_items, loading_bytes
from hpcft.planning.memory.model_states import persistent_bytes


def inputs_of(
    known: ModelFacts | None = None,
    precision: Any = "bf16",
    *,
    method: dict[str, Any] | None = None,
    site: str = "a100-80",
    load_bytes: int = 0,
    **train: Any,
) -> PlanInputs:
    """Returns the inputs of a made-up model in a precision, with fields of `train` changed."""
    made = recipe(method=method or {"name": "full"}, train=train)
    options = {"load_bytes": load_bytes, "fixed_precision": precision}
    return plan_inputs(made, cluster(site), known, **options)


def host_bytes(inputs: PlanInputs, on: Layout) -> dict[str, int]:
    """Returns the host memory of a node by component."""
    return {item.name: item.bytes for item in host_memory_items(inputs, on, 0)}


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
def test_persistent_bytes_equals_formula(
    stage: int, ranks: int, precision: Any, bytes_each: float
) -> None:
    least = persistent_bytes(inputs_of(precision=precision), layout(stage, ranks))
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
def test_zero_shards_equal_formula(stage: int, changes: dict[str, str], bytes_each: float) -> None:
    """DeepSpeed's memory.rst: 4L + 2P/N, 4L, 4L + 16P/N."""
    items = zero_memory.persistent_items(inputs_of(), layout(stage, 4, **changes))
    shards = sum(item.bytes for item in items if item.name != "reduce bucket")
    assert shards == pytest.approx(bytes_each * BILLION)
    buckets = [item.bytes for item in items if item.name == "reduce bucket"]
    assert buckets == ([2 * 2048**2] if stage == 3 else [])


@pytest.mark.parametrize(
    ("stage", "precision", "optim", "site", "bytes_each"),
    [
        # flat fp32 gradients, sqrt and quotient, and the shard that they were gathered in
        (2, "fp32", "adamw_torch", "cpu", 4 + 8 + 4),
        (2, "bf16", "adamw_torch", "cpu", 4 + 8 + 2),
        (2, "bf16", "adamw_torch", "a100-80", 4 + 4 + 2),  # over all at once: sqrt alone
        (2, "bf16", "adamw_torch_fused", "a100-80", 2 + 4 + 2),  # the cast is the most
        (3, "bf16", "adamw_torch", "cpu", (4 + 8) * 0.4),  # 1e8 of 2.5e8 elements at once
    ],
)
def test_optimizer_work_equals_formula(
    stage: int, precision: Any, optim: str, site: str, bytes_each: float
) -> None:
    inputs = inputs_of(precision=precision, site=site, optim=optim)
    (item,) = zero_memory.per_phase_items(inputs, layout(stage, 4), "optimizer", 1 / 4)
    assert item.bytes == pytest.approx(bytes_each * BILLION / 4)


@pytest.mark.parametrize(
    ("stage", "optimizer", "param", "host_each"),
    [(2, "cpu", "none", 16), (3, "cpu", "none", 16), (3, "cpu", "cpu", 18), (3, "nvme", "none", 0)],
)
def test_offloaded_states_equal_formula(
    stage: int, optimizer: str, param: str, host_each: float
) -> None:
    """DeepSpeed's memory.rst: 1.5 × 16 or 18 bytes over the nodes."""
    offloading = layout(stage, 4, offload_optimizer=optimizer, offload_param=param)
    host = host_bytes(inputs_of(), offloading)
    assert host.get("offloaded states", 0) == pytest.approx(1.5 * host_each * BILLION)


def test_host_memory_under_zero_3_holds_whole_weights_to_save_them() -> None:
    host = host_bytes(inputs_of(load_bytes=10), layout(3, 4))
    assert host["saving"] == 2 * BILLION
    assert "loading" not in host, "which is over by then"


def test_host_memory_counts_data_workers_of_each_rank() -> None:
    host = host_bytes(inputs_of(load_bytes=10, dataloader_num_workers=2), layout(3, 4))
    assert host["data workers"] == 4 * 2 * 64 * 2**20
    assert host["saving"] == 2 * BILLION


@pytest.mark.parametrize(("double", "each"), [(True, 0.516), (False, 0.563)])
def test_persistent_bytes_of_qlora_equal_formula(double: bool, each: float) -> None:
    """Checks a base of 7 billion: 6 in 4 bits, the rest in fp32 (by PEFT), adapters trained."""
    method = {"name": "qlora", "bnb_4bit_use_double_quant": double}
    counts = facts(7_020_000_000, trainable=20_000_000, quantised=6_000_000_000)
    one = persistent_bytes(inputs_of(counts, method=method), layout(0))
    assert one == pytest.approx(each * 6e9 + 4e9 + 12 * 20e6, rel=1e-3)
    paged = persistent_bytes(inputs_of(counts, method=method, optim="paged_adamw_8bit"), layout(0))
    assert one - paged == pytest.approx(6 * 20e6, rel=0.01)
    sharded = persistent_bytes(inputs_of(counts, method=method), layout(2, 4))
    assert sharded == pytest.approx(each * 6e9 + 2e9 + (2 + 12 / 4) * 20e6, rel=1e-3)


def test_offloading_of_lora_moves_the_frozen_weights_too() -> None:
    inputs = inputs_of(facts(8 * BILLION, trainable=10_000_000), method={"name": "lora"})
    items = {i.name: i.bytes for i in zero_memory.persistent_items(inputs, layout(3, 4))}
    assert items["weight shards"] == 2 * 8 * BILLION // 4
    offloading = layout(3, 4, offload_optimizer="cpu", offload_param="cpu")
    on_device = {i.name for i in zero_memory.persistent_items(inputs, offloading)}
    assert "weight shards" not in on_device
    host = host_bytes(inputs, offloading)
    assert host["offloaded frozen weights"] == 1.5 * 2 * (8 * BILLION - 10_000_000)


@pytest.mark.parametrize(
    ("method", "stage", "precision", "bytes_each"),
    [("full", 0, "bf16", 4), ("full", 2, "bf16", 2), ("lora", 0, "bf16", 2), ("full", 3, "bf16", 0),
     ("qlora", 0, "bf16", 0)],
)  # fmt: skip
def test_loading_bytes_are_all_weights_below_zero_3(
    method: str, stage: int, precision: Any, bytes_each: int
) -> None:
    """Below ZeRO-3 every rank builds the model in host memory; 4-bit weights go to the GPU."""
    inputs = inputs_of(precision=precision, method={"name": method}, load_bytes=100)
    assert loading_bytes(inputs, layout(stage, 2)) == max(100, bytes_each * BILLION)


def test_plan_counts_memory_besides_tensors() -> None:
    """On a GPU: fragments, context, NCCL, and the model on its way through host memory."""
    two = recipe(resources={"nodes": 1, "gpus_per_node": 2, "zero_stage": 0})
    made = plan_of(two, cluster("a100-80"), facts(), load_bytes=10)
    rank = {item.name: item.bytes for item in made.gpu_memory}
    outside = ("fragmentation", "CUDA context", "communicator buffers")
    tensors = sum(size for name, size in rank.items() if name not in outside)
    assert rank["fragmentation"] == int(rank_memory.FRAGMENTATION_SHARE * tensors)
    assert rank["CUDA context"] == rank["communicator buffers"] == GIB // 2
    assert rank["gradient buckets"] == 4 * BILLION
    host = {item.name: item.bytes for item in made.host_memory}
    assert host["loading"] == 2 * 4 * BILLION
    assert host["processes"] == 2 * 1.5 * GIB
    assert made.mem_mib == int(1.25 * sum(host.values()) / 2**20)


def test_plan_on_a_cpu_divides_the_node_memory_among_ranks() -> None:
    two = recipe(resources={"nodes": 1, "gpus_per_node": 2, "zero_stage": 0})
    made = plan_of(two, cluster("cpu"), facts(), load_bytes=10)
    host = {item.name: item.bytes for item in made.host_memory}
    process = 3 * GIB // 4
    assert host["training on the CPU"] == 2 * (made.gpu_peak_bytes - process)
    assert host["loading"] == 20
    assert made.gpu_capacity_bytes == 120 * GIB
