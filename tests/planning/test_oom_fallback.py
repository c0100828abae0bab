"""Tests which layout follows after a run is out of memory."""

from __future__ import annotations

from typing import Any

import pytest

import builders
from hpcft.config.recipe_types import FullRecipe
from hpcft.core.records import Cluster, Gpu, Layout, Plan
from hpcft.core.units import GIB
from hpcft.planning import deepspeed_config, oom_fallback
from hpcft.planning.inputs import PlanInputs


def recipe(**sections: Any) -> FullRecipe:
    """Returns a recipe with a global batch of 16."""
    return builders.recipe(**({"train": {"global_batch_size": 16}} | sections))


def site(**changes: Any) -> Cluster:
    """Returns a profile of 4 nodes with 4 GPUs each."""
    gpu = Gpu(name="A", memory_gib=40.0, compute_capability=8.0)
    fields: dict[str, Any] = {
        "name": "site", "scheduler": "slurm", "accelerator": "cuda", "max_nodes": 4, "gpu": gpu,
        "gpus_per_node": 4, "cores_per_node": 32, "host_memory_gib": 500.0, **changes,
    }  # fmt: skip
    return Cluster(**fields)


def layout(micro: int, ranks: int = 1, **changes: Any) -> Layout:
    """Returns a layout of one node with a global batch of 16."""
    accumulation = {"gradient_accumulation_steps": 16 // (micro * ranks)}
    sizes = {"per_device_train_batch_size": micro} | accumulation
    return builders.layout(0, ranks, **(sizes | changes))


def plan(first: Layout, made: FullRecipe, cluster: Cluster, eval_batch: int = 8) -> Plan:
    """Returns a plan of this layout without predictions."""
    facts = builders.facts(1000, layers=2, hidden_size=64, vocab_size=100, logits_width=2)
    inputs = PlanInputs(made, cluster, facts, fixed_precision="bf16")
    return Plan(
        recipe="made", cluster="site", accelerator=cluster.accelerator, layout=first,
        precision="bf16", optim="adamw_torch", per_device_eval_batch_size=eval_batch, facts=facts,
        gpu_memory=[], gpu_capacity_bytes=40 * GIB, host_memory=[], host_capacity_bytes=GIB,
        cpus_per_task=1, mem_mib=1, time_min=1,
        ds_config=deepspeed_config.build_deepspeed_config(inputs, first),
    )  # fmt: skip


def all_changes(first: Plan, made: FullRecipe, cluster: Cluster) -> list[str]:
    """Returns the changes of all fallbacks in order, each of which keeps the global batch."""
    changes, before = [], first
    while after := oom_fallback.next_fallback(before, made, cluster, "step"):
        new = after.layout
        per_rank = new.per_device_train_batch_size * new.gradient_accumulation_steps
        assert per_rank * new.world_size == made.train.global_batch_size
        if after.ds_config:
            assert after.ds_config["train_batch_size"] == made.train.global_batch_size
            micro = after.ds_config["train_micro_batch_size_per_gpu"]
            assert micro == new.per_device_train_batch_size
            assert after.ds_config["zero_optimization"]["stage"] == new.zero_stage
        assert (after.ds_config is None) == (new.zero_stage == 0)
        changes.append(oom_fallback.describe_change(before, after))
        before = after
    return changes


HALVES = ["micro-batch 8 → 4", "micro-batch 4 → 2", "micro-batch 2 → 1"]
OFFLOADS = ["no sharding → ZeRO-2, optimizer on cpu", "ZeRO-2 → ZeRO-3",
            "parameters on cpu"]  # fmt: skip
QLORA = {"name": "qlora", "r": 4}


@pytest.mark.parametrize(
    ("sections", "changes", "ranks", "expected"),
    [
        ({}, {}, 1, [*HALVES, "checkpointing", *OFFLOADS]),
        ({}, {}, 2, [*HALVES, "checkpointing", "no sharding → ZeRO-1", "ZeRO-1 → ZeRO-2",
                     "ZeRO-2 → ZeRO-3", "optimizer on cpu", "parameters on cpu"]),
        # A micro-batch or checkpointing that the recipe fixes does not change its result.
        ({"train": {"global_batch_size": 16, "per_device_train_batch_size": 8,
                    "gradient_checkpointing": False}}, {}, 1,
         [*HALVES, "checkpointing", *OFFLOADS]),
        # Sharding and offloading that the recipe fixes stay; so does what the method cannot do.
        ({"resources": {"zero_stage": 2, "offload_optimizer": "none"}}, {"zero_stage": 2}, 2,
         [*HALVES, "checkpointing"]),
        ({"train": {"global_batch_size": 16, "optim": "paged_adamw_8bit"}, "method": QLORA}, {}, 1,
         [*HALVES, "checkpointing"]),
        ({"train": {"global_batch_size": 16, "gradient_checkpointing": True}},
         {"gradient_checkpointing": True, "zero_stage": 3, "offload_optimizer": "cpu"}, 1,
         [*HALVES, "parameters on cpu"]),
        ({"train": {"global_batch_size": 24}}, {"gradient_accumulation_steps": 3}, 1,
         [*HALVES, "checkpointing", *OFFLOADS]),
    ],
)  # fmt: skip
def test_next_fallback_follows_the_order_of_cost(
    sections: dict[str, Any], changes: dict[str, Any], ranks: int, expected: list[str]
) -> None:
    made, cluster = recipe(**sections), site()
    first = plan(layout(8, ranks, **changes), made, cluster)
    assert all_changes(first, made, cluster) == expected


def test_next_fallback_on_a_cpu_offloads_nothing() -> None:
    made, cluster = recipe(), site(accelerator="cpu", gpu=None, gpus_per_node=0)
    first = plan(layout(8), made, cluster)
    assert all_changes(first, made, cluster) == [*HALVES, "checkpointing"]


@pytest.mark.parametrize(("total", "micro", "below"), [(12, 6, 3), (12, 3, 1), (7, 7, 1)])
def test_next_layout_keeps_the_global_batch_exactly(total: int, micro: int, below: int) -> None:
    first = layout(micro, gradient_accumulation_steps=total // micro)
    after = oom_fallback.next_layout(first, recipe(train={"global_batch_size": total}), site())
    assert after is not None
    assert after.per_device_train_batch_size == below
    assert below * after.gradient_accumulation_steps == total


def test_next_fallback_for_states_offloads_instead_of_halving_the_batch() -> None:
    made, cluster = recipe(), site()
    after = oom_fallback.next_fallback(plan(layout(8), made, cluster), made, cluster, "states")
    assert after is not None
    assert after.layout.per_device_train_batch_size == 8
    assert after.layout.offload_optimizer == "cpu"


def test_next_fallback_for_evaluation_halves_its_own_batch_first() -> None:
    made, cluster = recipe(), site()
    now: Plan | None = plan(layout(8), made, cluster, eval_batch=4)
    sizes = []
    while now is not None and now.layout == layout(8):
        sizes.append(now.per_device_eval_batch_size)
        now = oom_fallback.next_fallback(now, made, cluster, "evaluation")
    assert sizes == [4, 2, 1]
    assert now is not None, "then weights and optimizer are moved"
    first = plan(layout(8), made, cluster, eval_batch=32)
    after_step = oom_fallback.next_fallback(first, made, cluster, "step")
    assert after_step is not None
    assert after_step.per_device_eval_batch_size == 16, "it stays a multiple of the micro-batch"


def test_with_layout_keeps_the_precision_of_the_plan() -> None:
    made, cluster = recipe(), site()
    first = plan(layout(8), made, cluster).model_copy(update={"precision": "fp16"})
    after = oom_fallback.with_layout(
        first, layout(8, zero_stage=2), 8, recipe=made, cluster=cluster
    )
    assert after.ds_config is not None
    assert after.ds_config["fp16"]["enabled"]
    assert not after.ds_config["bf16"]["enabled"]


def test_next_node_count_is_none_where_more_nodes_do_not_help() -> None:
    last = layout(1, 4, zero_stage=3, gradient_checkpointing=True)
    assert oom_fallback.next_node_count(last, recipe(), site()) == 2
    assert oom_fallback.next_node_count(last, recipe(), site(max_nodes=1)) is None
    only_four = recipe(train={"global_batch_size": 4})
    assert oom_fallback.next_node_count(last, only_four, site()) is None, "a rank needs an example"


def test_double_host_memory_stops_at_what_a_node_has() -> None:
    first = plan(layout(8), recipe(), site()).model_copy(
        update={"mem_mib": 3 * 1024, "host_capacity_bytes": 8 * GIB}
    )
    second = oom_fallback.double_host_memory(first)
    assert second is not None
    assert oom_fallback.describe_change(first, second) == "host memory 3 GiB → 6 GiB"
    third = oom_fallback.double_host_memory(second)
    assert third is not None
    assert third.mem_mib == 8 * 1024
    assert oom_fallback.double_host_memory(third) is None
