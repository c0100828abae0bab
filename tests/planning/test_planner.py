"""Tests plans of shipped recipes, precision, checks of resources, and allowed layouts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from builders import (
    BILLION,
    CLASSIFY,
    COMPLETE,
    NVME,
    ROOT,
    Cli,
    cluster,
    facts,
    linear_trace,
    plan_inputs,
    plan_of,
    recipe,
)
from hpcft.config import cluster_profile
from hpcft.config.recipe import load_recipe
from hpcft.config.recipe_types import FullRecipe
from hpcft.core.errors import DoesNotFit, InputError, Problem
from hpcft.core.records import Cluster
from hpcft.jobs.what_fits import plan_run
from hpcft.planning import model_facts, planner
from hpcft.planning.hardware import choose_precision
from hpcft.planning.inputs import PlanInputs
from hpcft.planning.layouts import allowed_layouts, powers_of_two
from hpcft.planning.memory.trace_types import StepMemory, TracedStep
from hpcft.planning.resource_checks import check_overflow, check_resources

RECIPES = sorted(file.stem for file in (ROOT / "recipes").glob("*.yaml"))
pytestmark = pytest.mark.usefixtures("cache_of_this_module")


# ---------------------------------------------------------------- shipped recipes


def test_full_gemma_does_not_fit_a_t4() -> None:
    (point,) = load_recipe("gemma7b_full")
    with pytest.raises(DoesNotFit) as refused:
        plan_run(point, cluster_profile.load_profile("t4-16"))
    lines = str(refused.value).splitlines()
    assert lines[0].startswith("gemma7b_full does not fit t4-16: ")
    assert "of a T4" in lines[0] or "host memory" in lines[0]
    assert "8.54 B parameters" in lines[2]
    assert "nodes (t4-16 allows 1)" in lines[3] or "each, or a smaller method" in lines[3]


def test_smallest_change_of_error_does_fit() -> None:
    """The recipe fixes a layout that is too large; the change that the error names is tried."""
    tight = {"resources": {"nodes": 1, "gpus_per_node": 1, "zero_stage": 0},
             "train": {"gradient_checkpointing": False}}  # fmt: skip
    made, site = recipe(task=COMPLETE, **tight), cluster("a100-40")
    with pytest.raises(DoesNotFit, match=r"smallest change: resources\.zero_stage: auto"):
        plan_of(made, site, facts(3 * BILLION))
    freed = recipe(task=COMPLETE, **(tight | {"resources": {"nodes": 1, "gpus_per_node": 1}}))
    assert plan_of(freed, site, facts(3 * BILLION)).layout.offload_optimizer == "cpu"


def test_quickstart_fits_this_machine(cli: Cli) -> None:
    result = cli("plan", "quickstart", "-c", "local", "--json")
    assert result.code == 0, result.err
    shown = result.json
    assert shown["layout"]["zero_stage"] == 3
    assert shown["facts"]["parameters"]["total"] == 240_901
    assert shown["gpu_peak_bytes"] == sum(item["bytes"] for item in shown["gpu_memory"])


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("site", "train", "expected"),
    [
        ("a100-80", {}, "bf16"),
        ("h200-141", {}, "bf16"),
        ("v100-16", {}, "fp16"),
        ("t4-16", {}, "fp16"),
        ("cpu", {}, "fp32"),
        ("testbed", {}, "fp32"),
        ("a100-80", {"fp16": True}, "fp16"),
        ("a100-80", {"bf16": False}, "fp16"),
        ("a100-80", {"bf16": False, "fp16": False}, "fp32"),
        ("t4-16", {"fp16": False}, "fp32"),
        ("cpu", {"bf16": True}, "bf16"),
    ],
)
def test_choose_precision_follows_recipe_then_hardware(
    site: str, train: dict[str, bool], expected: str
) -> None:
    made = recipe(train=train)
    assert problems_of(plan_inputs(made, cluster(site))) == []
    assert choose_precision(made.train, cluster(site)) == expected


@pytest.mark.parametrize(
    ("site", "sections", "known", "is_refused"),
    [
        ("v100-16", {}, "gemma", True),
        ("v100-16", {"train": {"fp16": False}}, "gemma", False),
        ("v100-16", {"method": {"name": "lora"}}, "gemma", False),
        ("v100-16", {}, "llama", False),
        ("a100-80", {}, "gemma", False),
        ("a100-80", {"train": {"fp16": True}}, "t5", True),
    ],
)
def test_full_fine_tuning_of_what_overflows_in_float16_is_refused(
    site: str, sections: dict[str, Any], known: str, is_refused: bool
) -> None:
    made = recipe(**sections)
    inputs = plan_inputs(made, cluster(site), facts(100_000_000, model_type=known))
    if not is_refused:
        check_overflow(inputs, str)
        return
    with pytest.raises(InputError, match=r"overflows in float16, .*use train\.fp16: false"):
        check_overflow(inputs, str)


@pytest.mark.parametrize(
    ("method", "change"),
    [("frozen", "method.load_in_4bit: true"), ("lora", "method.name: qlora"), ("head_only", "")],
)
def test_smallest_change_names_four_bits(method: str, change: str) -> None:
    """A 7 B model in 16 bits exceeds a T4; in 4 bits it does not."""
    made = recipe(method={"name": method}, resources={"gpus_per_node": 1})
    whole, small = facts(7 * BILLION, trainable=0), facts(2 * BILLION, trainable=0)

    def trace(step: TracedStep) -> StepMemory:
        in_four_bits = not step.method.four_bit_change and bool(change)
        return linear_trace(small if in_four_bits else whole)(step)

    inputs = PlanInputs(made, cluster("t4-16"), whole, trace=trace, facts_of=lambda _: small)
    with pytest.raises(DoesNotFit) as refused:
        planner.make_plan(inputs)
    last = str(refused.value).partition("smallest change: ")[2]
    assert last.startswith(f"{change} (1 node × 1" if change else "nodes with")
    without = replace(inputs, facts_of=lambda _: whole, trace=linear_trace(whole))
    with pytest.raises(DoesNotFit) as refused:
        planner.make_plan(without)
    assert "4bit" not in str(refused.value), "where 4 bits do not help either"


def test_plan_warns_of_gemma_in_float16() -> None:
    small = facts(100_000_000, model_type="gemma")
    (warning,) = plan_of(recipe(), cluster("v100-16"), small).warnings
    assert "gemma overflows in float16 and V100-SXM2-16GB has no bfloat16" in warning
    assert plan_of(recipe(), cluster("a100-80"), small).warnings == []
    assert plan_of(recipe(), cluster("v100-16"), facts(100_000_000)).warnings == []


# ---------------------------------------------------------------- checks of resources


def problems_of(inputs: PlanInputs) -> list[Problem]:
    """Returns what the checks of resources find."""
    try:
        check_resources(inputs, lambda key: f"recipe.yaml of {key}")
    except InputError as error:
        return error.problems
    return []


@pytest.mark.parametrize(
    ("site", "sections", "field", "what"),
    [
        ("a100-80", {"resources": {"gpus_per_node": 5}}, "resources.gpus_per_node", "has 4 GPUs"),
        ("cpu", {"resources": {"gpus_per_node": 65}}, "resources.gpus_per_node", "has 64 cores"),
        ("a100-80", {"resources": {"nodes": 17}}, "resources.nodes", "at most 16"),
        ("testbed", {"resources": {"time_min": 61}}, "resources.time_min", "at most 60"),
        ("testbed", {"resources": {"partition": "gpu"}}, "resources.partition", "no partition"),
        ("a100-80", {"task": CLASSIFY | {"max_length": 5000}}, "task.max_length", "at most 4096"),
        ("t4-16", {"train": {"bf16": True}}, "train.bf16", "T4 has no bfloat16"),
        ("cpu", {"train": {"fp16": True}}, "train.fp16", "float16"),
        ("a100-80", {"resources": {"zero_stage": 2, "offload_param": "cpu"}},
         "resources.offload_param", "ZeRO-3 only"),
        ("a100-80", {"resources": {"offload_optimizer": "nvme"}}, "resources.offload_optimizer",
         "no node-local disk"),
        ("a100-80", {"method": {"name": "qlora"}, "resources": {"zero_stage": 3}},
         "resources.zero_stage", "works with stages 0, 1, 2"),
        ("a100-80", {"method": {"name": "qlora"}, "resources": {"offload_param": "cpu"}},
         "resources", "no layout of qlora"),
        ("a100-80", {"resources": {"zero_stage": 1, "offload_optimizer": "cpu"}}, "resources",
         "no layout of full with adamw_torch has zero_stage 1, offload_optimizer cpu"),
        ("a100-80", {"train": {"optim": "paged_adamw_8bit"},
                     "resources": {"offload_optimizer": "cpu"}}, "resources", "paged_adamw_8bit"),
        ("a100-80", {"resources": {"offload_optimizer": "none", "offload_param": "cpu"}},
         "resources", "no layout of full"),
    ],
)  # fmt: skip
def test_check_resources_finds_what_is_not_there(
    site: str, sections: dict[str, Any], field: str, what: str
) -> None:
    problems = problems_of(plan_inputs(recipe(**sections), cluster(site)))
    assert [problem.key for problem in problems] == [field]
    assert problems[0].where == f"recipe.yaml of {field}"
    assert what in problems[0].what
    assert problems[0].fix, "every problem says how to correct it"


def test_check_resources_accepts_nvme_with_a_disk() -> None:
    requested = recipe(resources={"offload_optimizer": "nvme", "offload_param": "nvme"})
    assert problems_of(plan_inputs(requested, cluster("a100-80", **NVME))) == []


def test_check_resources_counts_reserved_positions_of_roberta() -> None:
    """514 rows of position embeddings take 512 tokens: counting starts after the padding's row."""
    (point,) = load_recipe("roberta_mnli_full", ["task.max_length=513"])
    model, task, method = point.recipe.model, point.recipe.task, point.recipe.method
    counted = model_facts.compute_model_facts(model, task, method)
    assert counted.max_positions == 512
    (problem,) = problems_of(plan_inputs(point.recipe, known=counted))
    assert "at most 512 tokens, got 513" in problem.what


# ---------------------------------------------------------------- layouts


def combinations(made: FullRecipe, site: Cluster) -> set[tuple[int, int, str, str]]:
    """Returns world size, ZeRO stage and offloading of all layouts."""
    return {(x.world_size, x.zero_stage, x.offload_optimizer, x.offload_param)
            for x in allowed_layouts(made, site)}  # fmt: skip


def test_allowed_layouts_keep_zero_3_on_one_rank_if_requested() -> None:
    one = {"nodes": 1, "gpus_per_node": 1, "zero_stage": 3}
    assert combinations(recipe(resources=one), cluster("cpu")) == {(1, 3, "none", "none")}
    assert (1, 3, "cpu", "none") in combinations(recipe(resources=one), cluster("a100-80"))
    plan = plan_of(recipe(resources=one), cluster("a100-80"), facts(100_000_000))
    assert plan.layout.zero_stage == 3
    assert plan.ds_config is not None


def test_allowed_layouts_with_fixed_stage_leave_offloading_open() -> None:
    fixed = recipe(resources={"nodes": 1, "gpus_per_node": 4, "zero_stage": 2})
    assert combinations(fixed, cluster("a100-80")) == {
        (4, 2, "none", "none"),
        (4, 2, "cpu", "none"),
    }
    fits = plan_of(fixed, cluster("a100-40"), facts(7 * BILLION))
    assert fits.layout.offload_optimizer == "cpu", "2 + 18 / 4 bytes each are 42 GiB"


def test_allowed_layouts_on_a_cpu_offload_only_if_requested() -> None:
    shape = {"nodes": 1, "gpus_per_node": 2, "zero_stage": 3}
    assert combinations(recipe(resources=shape), cluster("cpu")) == {(2, 3, "none", "none")}
    requested = recipe(resources=shape | {"offload_optimizer": "cpu"})
    assert combinations(requested, cluster("cpu")) == {(2, 3, "cpu", "none")}


def test_allowed_layouts_do_not_shard_one_rank_unless_requested() -> None:
    for world, stage, optimizer, _ in combinations(recipe(), cluster("t4-16")):
        assert world == 1
        assert stage == 0 or optimizer != "none"


@pytest.mark.parametrize(
    ("batch", "worlds"), [(6, {1, 2}), (7, {1}), (64, {1, 2, 4, 8, 16, 32, 64})]
)
def test_allowed_layouts_split_the_global_batch_exactly(batch: int, worlds: set[int]) -> None:
    made = recipe(train={"global_batch_size": batch})
    found = list(allowed_layouts(made, cluster("a100-80")))
    assert {x.world_size for x in found} == worlds
    for x in found:
        each = x.per_device_train_batch_size * x.gradient_accumulation_steps
        assert each * x.world_size == batch


@pytest.mark.parametrize(
    "fixed",
    [{"resources": {"nodes": 1, "gpus_per_node": 3}, "train": {"global_batch_size": 16}},
     {"resources": {"nodes": 1, "gpus_per_node": 4},
      "train": {"global_batch_size": 16, "per_device_train_batch_size": 8}}],
)  # fmt: skip
def test_make_plan_with_indivisible_global_batch_says_so(fixed: dict[str, Any]) -> None:
    with pytest.raises(DoesNotFit, match=r"global_batch_size 16 cannot be split.*a multiple of"):
        plan_of(recipe(**fixed), cluster("a100-80"), facts(100_000_000))


def test_make_plan_prefers_fewer_gpu_hours_to_fewer_gpus() -> None:
    """3 billion × 18 bytes fit one card of 39 GiB with the optimizer on the CPU.

    Two cards without offloading take less than half the time, which is fewer GPU hours.
    """
    made, site = recipe(), cluster("a100-40")
    small = plan_of(made, site, facts(1_500_000_000)).layout
    assert (small.world_size, small.offload_optimizer) == (1, "none")
    wide = plan_of(made, site, facts(3 * BILLION)).layout
    assert (wide.world_size, wide.offload_optimizer) == (2, "none")
    one = cluster("a100-40", gpus_per_node=1, max_nodes=1)
    assert plan_of(made, one, facts(3 * BILLION)).layout.offload_optimizer == "cpu"


@pytest.mark.parametrize(("most", "steps"), [(1, [1]), (4, [1, 2, 4]), (6, [1, 2, 4, 6])])
def test_powers_of_two_end_with_the_limit(most: int, steps: list[int]) -> None:
    assert powers_of_two(most) == steps


def test_make_plan_respects_host_memory() -> None:
    fixed = recipe(resources={"nodes": 1, "gpus_per_node": 4, "zero_stage": 3,
                              "offload_optimizer": "cpu", "offload_param": "cpu"})  # fmt: skip
    with pytest.raises(DoesNotFit, match="of host memory of a node"):
        plan_of(fixed, cluster("a100-80", host_memory_gib=64), facts(7 * BILLION))
