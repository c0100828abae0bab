"""Tests the search: equal to an exhaustive one, with few predictions, and monotonous."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import (
    BILLION,
    COMPLETE,
    NVME,
    cluster,
    facts,
    layouts_of,
    plan_inputs,
    plan_of,
    recipe,
)
from hpcft.config.recipe_types import FullRecipe
from hpcft.core.errors import DoesNotFit
from hpcft.core.records import Cluster, ModelFacts, Plan
from hpcft.core.units import GIB
from hpcft.planning import planner
from hpcft.planning.infeasible import plan_excess
from hpcft.planning.layouts import describe_layout
from hpcft.planning.search import NEAR_TIE

SITES = ("t4-16", "t4-16-x2", "v100-16", "a100-40", "a100-80", "h100-80")
sizes = st.integers(min_value=50_000_000, max_value=20 * BILLION)
batches = st.sampled_from([1, 6, 8, 16, 64])
sites = st.sampled_from(SITES)


def planned(made: FullRecipe, site: Cluster, known: ModelFacts) -> Plan | None:
    """Returns the plan; None if nothing fits."""
    try:
        return plan_of(made, site, known, brief=True)
    except DoesNotFit:
        return None


def with_gpu(site: Cluster, **changes: Any) -> Cluster:
    """Returns the profile with fields of its GPU changed."""
    assert site.gpu is not None
    return site.model_copy(update={"gpu": site.gpu.model_copy(update=changes)})


# ---------------------------------------------------------------- properties


@pytest.mark.process
@settings(max_examples=40, deadline=None)
@given(sizes, batches, sites)
def test_search_finds_the_cheapest_of_all_layouts(size: int, batch: int, name: str) -> None:
    made, known = recipe(task=COMPLETE, train={"global_batch_size": batch}), facts(size)
    site = cluster(name, max_nodes=2, **NVME)
    every = layouts_of(made, site, known)
    cheapest = min((a for a in every if not a.why_infeasible), default=None,
                   key=lambda a: a.gpu_hours_per_1000_steps)  # fmt: skip
    found = planned(made, site, known)
    assert (found is None) == (cheapest is None)
    if found and cheapest:
        assert plan_excess(found) <= 0
        hours = found.gpu_hours_per_1000_steps
        assert hours is not None
        assert hours <= (1 + NEAR_TIE) * cheapest.gpu_hours_per_1000_steps * (1 + 1e-9)
        assert all(a.why_infeasible for a in found.cheaper_infeasible)
        if found.next_best:
            assert not found.next_best.why_infeasible
            assert found.next_best.layout != found.layout


@settings(max_examples=40, deadline=None)
@given(sizes, batches, sites, st.floats(min_value=1, max_value=4))
def test_more_memory_never_makes_a_run_infeasible(
    size: int, batch: int, name: str, factor: float
) -> None:
    made, known = recipe(train={"global_batch_size": batch}), facts(size)
    site = cluster(name, max_nodes=2)
    assert site.gpu is not None
    wider = with_gpu(site, memory_gib=site.gpu.memory_gib * factor)
    richer = wider.model_copy(update={"host_memory_gib": site.host_memory_gib * factor})
    before, after = planned(made, site, known), planned(made, richer, known)
    assert before is None or after is not None
    if before and after:
        hours = before.gpu_hours_per_1000_steps, after.gpu_hours_per_1000_steps
        assert hours[0] is not None
        assert hours[1] is not None
        assert hours[1] <= (1 + NEAR_TIE) * hours[0] * (1 + 1e-9), "nor dearer"


@settings(max_examples=40, deadline=None)
@given(sizes, st.sampled_from([1, 2, 4, 8]), st.booleans())
def test_more_gpus_never_raise_the_peak_of_zero_3(size: int, micro: int, recompute: bool) -> None:
    fixed = {"per_device_train_batch_size": micro, "global_batch_size": 512,
             "gradient_checkpointing": recompute}  # fmt: skip
    peaks = []
    for nodes in (1, 2, 4, 8):
        shape = {"nodes": nodes, "gpus_per_node": 4, "zero_stage": 3,
                 "offload_optimizer": "none", "offload_param": "none"}  # fmt: skip
        made = recipe(train=fixed, resources=shape)
        (only,) = layouts_of(made, cluster("a100-80"), facts(size))
        assert only.gpu_peak_bytes is not None
        peaks.append(only.gpu_peak_bytes)
    assert peaks == sorted(peaks, reverse=True)


@pytest.mark.process
@settings(max_examples=40, deadline=None)
@given(sizes, sites)
def test_larger_micro_batch_never_takes_less(size: int, name: str) -> None:
    """The search relies on this: if a micro-batch does not fit, larger ones do not either."""
    kinds: dict[str, list[tuple[int, int]]] = {}
    for a in layouts_of(recipe(), cluster(name, max_nodes=1), facts(size)):
        if a.layout.gradient_accumulation_steps == 1:
            continue  # It holds no earlier gradients; the search tries it separately.
        kind = describe_layout(a.layout.model_copy(update={"per_device_train_batch_size": 1}))
        assert a.gpu_peak_bytes is not None
        kinds.setdefault(kind, []).append((a.layout.per_device_train_batch_size, a.gpu_peak_bytes))
    for sizes_and_peaks in kinds.values():
        peaks = [peak for _, peak in sorted(sizes_and_peaks)]
        rounding = 4096  # components are rounded, and shares of them
        assert all(b >= a - rounding for a, b in itertools.pairwise(peaks))


# ---------------------------------------------------------------- choices


def test_plan_has_fewest_gpu_hours_and_lists_other_layouts() -> None:
    plan = plan_of(recipe(), cluster("a100-40"), facts(3 * BILLION))
    assert plan.layout.world_size == 2
    assert plan.reasons[0] == "2 GPUs: the fewest GPU hours of what fits"
    one = next(a for a in plan.cheaper_infeasible if a.layout.world_size == 1)
    assert one.why_infeasible == "at least 47.4 GiB of 39.4 GiB a GPU"
    larger = plan_of(recipe(), cluster("a100-40"), facts(8 * BILLION)).cheaper_infeasible[0]
    assert (larger.why_infeasible, larger.gpu_peak_bytes) == (
        "at least 126 GiB of 39.4 GiB a GPU", None
    )  # fmt: skip
    assert plan.next_best is not None
    dearer = plan.next_best.gpu_hours_per_1000_steps
    assert plan.gpu_hours_per_1000_steps is not None
    assert dearer > plan.gpu_hours_per_1000_steps / (1 + NEAR_TIE)


def test_run_beyond_its_time_limit_takes_more_gpus() -> None:
    """500,000 steps of a third of a second are two days on one GPU; the profile allows one."""
    made = recipe(train={"max_steps": 500_000, "global_batch_size": 64})
    known = {"test": 10}
    site, small = cluster("a100-80"), facts(200_000_000)
    early = plan_of(recipe(train={"max_steps": 50, "global_batch_size": 64}), site, small,
                         examples=known)  # fmt: skip
    assert early.layout.world_size == 1
    late = plan_of(made, site, small, examples=known)
    assert late.time is not None
    assert late.time.run_s is not None
    assert late.layout.world_size > 1
    assert late.time.run_s <= 1440 * 60
    assert late.warnings == []
    never = plan_of(made, cluster("a100-80", time_limit_min=5), small, examples=known)
    assert never.layout.world_size == 64, "the fastest layout"
    assert "its time limit is 5:00, and no layout is faster" in never.warnings[0]


def test_offloading_to_nvme_needs_disk_space() -> None:
    fixed = recipe(resources={"nodes": 1, "gpus_per_node": 1, "offload_optimizer": "nvme"})
    site = cluster("a100-80", **NVME)
    plan = plan_of(fixed, site, facts(3 * BILLION))
    assert plan.node_disk_bytes == 16 * 3 * BILLION
    assert plan.node_disk_capacity_bytes == 1000 * GIB
    with pytest.raises(DoesNotFit, match=r"44.7 GiB needed, 10 GiB of disk of a node"):
        plan_of(fixed, cluster("a100-80", **(NVME | {"node_disk_gib": 10.0})),
                     facts(3 * BILLION))  # fmt: skip


def test_plan_leaves_a_margin_of_gpu_memory() -> None:
    site = cluster("a100-80", max_nodes=1)
    plan = plan_of(recipe(), site, facts())
    assert site.gpu is not None
    tight = with_gpu(site, memory_gib=plan.gpu_peak_bytes / GIB * 1.01)
    other = plan_of(recipe(), tight, facts())
    assert other.layout != plan.layout
    assert other.gpu_peak_bytes <= 0.98 * other.gpu_capacity_bytes


# ---------------------------------------------------------------- shared GPUs


def test_error_explains_gpu_memory_of_other_processes() -> None:
    """Report R5: other processes held 14.69 of 14.74 GiB; no batch is small enough."""
    shared = with_gpu(cluster("t4-16"), memory_gib=14.74, other_processes_gib=14.69)
    small = facts(10_000_000)
    with pytest.raises(DoesNotFit) as refused:
        plan_of(recipe(), shared, small)
    text = str(refused.value)
    assert "they hold 14.69 of 14.74 GiB and leave 51.2 MiB" in text
    assert "a smaller batch cannot help" in text
    assert "on a T4 of its own it fits: 1 node × 1" in text
    assert "smallest change" not in text
    half = with_gpu(cluster("t4-16"), memory_gib=14.74, other_processes_gib=4.65)
    plan = plan_of(recipe(), half, small)
    assert plan.gpu_capacity_bytes == int(10.09 * GIB)
    assert plan.other_processes_bytes == int(4.65 * GIB)


# ---------------------------------------------------------------- chunked loss


def test_plan_chunks_the_loss_only_where_needed() -> None:
    """2048 tokens of 256 thousand words are 4.9 GiB of logits for each example."""
    made = recipe(task=COMPLETE | {"max_length": 2048}, train={"global_batch_size": 4},
                  resources={"nodes": 1, "gpus_per_node": 1, "zero_stage": 0},
                  method={"name": "lora"})  # fmt: skip
    known = {"logits_width": 256_000, "trainable": 10_000_000}
    able, unable = (facts(2 * BILLION, supports_chunked_loss=can, **known) for can in (True, False))
    small, large = (with_gpu(cluster("a100-80", max_nodes=1), memory_gib=gib) for gib in (8.5, 80))
    with pytest.raises(DoesNotFit):
        plan_of(made, small, unable, brief=True)
    plan = plan_of(made, small, able)
    assert plan.layout.loss_chunks == 8
    assert "loss in 8 parts" in describe_layout(plan.layout)
    assert "logits and loss are computed in 8 parts" in " ".join(plan.reasons)
    assert plan_of(made, large, able).layout.loss_chunks == 1, "it costs time"


# ---------------------------------------------------------------- effort


def test_search_predicts_memory_of_few_layouts() -> None:
    made = recipe(task=COMPLETE, train={"global_batch_size": 2048})
    known = facts(8 * BILLION)
    site = cluster("h100-80", max_nodes=128, **NVME)
    search = planner._search(plan_inputs(made, site, known))
    assert len(search.ordered) > 1000
    assert search.best() is not None
    assert len(search._plans) < len(search.ordered) / 4


def test_make_plan_searches_thousands_of_layouts_in_two_seconds() -> None:
    made = recipe(task=COMPLETE, train={"global_batch_size": 2048})
    site = cluster("h100-80", max_nodes=128, **NVME)
    begun = time.process_time()
    plan_of(made, site, facts(70 * BILLION))
    assert time.process_time() - begun < 2.0
