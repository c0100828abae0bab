"""Plans: every shipped recipe on shipped profiles, precision, nonsense, and the layouts."""

from __future__ import annotations

from typing import Any

import pytest

from builders import BILLION, CLASSIFY, COMPLETE, NVME, ROOT, Cli, cluster, facts, plan_of, recipe
from hpcft.config import cluster_profile
from hpcft.config.recipe import load_recipe
from hpcft.config.recipe_types import FullRecipe
from hpcft.core.errors import DoesNotFit, InputError
from hpcft.core.records import Cluster
from hpcft.jobs.what_fits import plan_run
from hpcft.planning import model_facts
from hpcft.planning.layouts import allowed_layouts, choose_precision, powers_of_two
from hpcft.planning.resource_checks import check_resources

RECIPES = sorted(file.stem for file in (ROOT / "recipes").glob("*.yaml"))
pytestmark = pytest.mark.usefixtures("cache_of_this_module")


# ---------------------------------------------------------------- what ships


# One of each kind: with bfloat16 and without. `docs/fits.md` has the rest.
@pytest.mark.parametrize("site", ["a100-80", "t4-16"])
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_fits_or_is_refused_with_a_change_that_would(name: str, site: str) -> None:
    (point,) = load_recipe(str(ROOT / "recipes" / f"{name}.yaml"))
    known = cluster_profile.load_profile(site)
    try:
        plan = plan_run(point, known)
    except (DoesNotFit, InputError) as error:
        refused = error
    else:
        refused = None
    asked = point.recipe.resources.gpus_per_node
    if asked != "auto" and asked > (known.cluster.gpus_per_node or known.cluster.cores_per_node):
        assert "resources.gpus_per_node: expected at most" in str(refused)
        return
    if refused is not None:
        assert str(refused).partition("smallest change: ")[2].strip()
        return
    found = plan.layout
    assert 0 < plan.gpu_peak_bytes <= plan.gpu_capacity_bytes
    assert 0 < plan.host_peak_bytes <= plan.host_capacity_bytes
    assert plan.mem_mib * 2**20 <= plan.host_capacity_bytes
    assert plan.cpus_per_task * found.ranks_per_node <= known.cluster.cores_per_node
    batch = found.per_device_train_batch_size * found.gradient_accumulation_steps
    if point.recipe.method.trains:
        assert batch * found.world_size == point.recipe.train.global_batch_size
    if plan.ds_config is not None:
        assert plan.ds_config["train_batch_size"] == batch * found.world_size
    assert (plan.ds_config is None) == (found.zero_stage == 0)


def test_gemma_in_full_is_refused_on_a_t4() -> None:
    (point,) = load_recipe("gemma7b_full")
    with pytest.raises(DoesNotFit) as refused:
        plan_run(point, cluster_profile.load_profile("t4-16"))
    lines = str(refused.value).splitlines()
    assert lines[0].startswith("gemma7b_full does not fit t4-16: ")
    assert "of a T4" in lines[0] or "host memory" in lines[0]
    assert "8.54 B parameters" in lines[2]
    assert "nodes (t4-16 allows 1)" in lines[3] or "each, or a smaller method" in lines[3]


def test_the_change_that_a_refusal_names_does_fit() -> None:
    """A layout that the recipe fixes too tightly: what is said to help is tried."""
    tight = {"resources": {"nodes": 1, "gpus_per_node": 1, "zero_stage": 0},
             "train": {"gradient_checkpointing": False}}  # fmt: skip
    made, site = recipe(task=COMPLETE, **tight), cluster("a100-40")
    with pytest.raises(DoesNotFit, match=r"smallest change: resources\.zero_stage: auto"):
        plan_of(made, site, facts(3 * BILLION))
    freed = recipe(task=COMPLETE, **(tight | {"resources": {"nodes": 1, "gpus_per_node": 1}}))
    assert plan_of(freed, site, facts(3 * BILLION)).layout.offload_optimizer == "cpu"


def test_quickstart_fits_this_machine(cli: Cli) -> None:
    said = cli("plan", "quickstart", "-c", "local", "--json")
    assert said.code == 0, said.err
    shown = said.json
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
def test_precision(site: str, train: dict[str, bool], expected: str) -> None:
    made = recipe(train=train)
    assert check_resources(made, cluster(site), facts()) == []
    assert choose_precision(made, cluster(site)) == expected


def test_gemma_in_float16_is_warned_of() -> None:
    small = facts(100_000_000, model_type="gemma")
    (warning,) = plan_of(recipe(), cluster("v100-16"), small).warnings
    assert "gemma overflows in float16 and V100-SXM2-16GB has no bfloat16" in warning
    assert plan_of(recipe(), cluster("a100-80"), small).warnings == []
    assert plan_of(recipe(), cluster("v100-16"), facts(100_000_000)).warnings == []


# ---------------------------------------------------------------- nonsense


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
def test_nonsense_is_refused(site: str, sections: dict[str, Any], field: str, what: str) -> None:
    found = check_resources(recipe(**sections), cluster(site), facts())
    assert [".".join(map(str, loc)) for loc, _, _ in found] == [field]
    assert what in found[0][1]
    assert found[0][2], "every problem says how to mend it"


def test_nvme_is_accepted_where_there_is_a_disk() -> None:
    asked = recipe(resources={"offload_optimizer": "nvme", "offload_param": "nvme"})
    assert check_resources(asked, cluster("a100-80", **NVME), facts()) == []


def test_too_long_for_roberta_counts_its_reserved_positions() -> None:
    """514 rows of position embeddings take 512 tokens: counting starts behind the padding's."""
    (point,) = load_recipe("roberta_mnli_full", ["task.max_length=513"])
    model, task, method = point.recipe.model, point.recipe.task, point.recipe.method
    counted = model_facts.compute_model_facts(model, task, method)
    assert counted.max_positions == 512
    (found,) = check_resources(point.recipe, cluster("a100-80"), counted)
    assert "at most 512 tokens, got 513" in found[1]


# ---------------------------------------------------------------- layouts


def combinations(made: FullRecipe, site: Cluster) -> set[tuple[int, int, str, str]]:
    """World size, stage and offloading of all layouts."""
    return {(x.world_size, x.zero_stage, x.offload_optimizer, x.offload_param)
            for x in allowed_layouts(made, site)}  # fmt: skip


def test_zero3_fixed_on_one_rank_is_kept() -> None:
    one = {"nodes": 1, "gpus_per_node": 1, "zero_stage": 3}
    assert combinations(recipe(resources=one), cluster("cpu")) == {(1, 3, "none", "none")}
    assert (1, 3, "cpu", "none") in combinations(recipe(resources=one), cluster("a100-80"))
    plan = plan_of(recipe(resources=one), cluster("a100-80"), facts(100_000_000))
    assert plan.layout.zero_stage == 3
    assert plan.ds_config is not None


def test_a_fixed_stage_leaves_offloading_to_the_plan() -> None:
    fixed = recipe(resources={"nodes": 1, "gpus_per_node": 4, "zero_stage": 2})
    assert combinations(fixed, cluster("a100-80")) == {
        (4, 2, "none", "none"),
        (4, 2, "cpu", "none"),
    }
    fits = plan_of(fixed, cluster("a100-40"), facts(7 * BILLION))
    assert fits.layout.offload_optimizer == "cpu", "2 + 18 / 4 bytes each are 42 GiB"


def test_offloading_on_a_cpu_only_where_asked() -> None:
    shape = {"nodes": 1, "gpus_per_node": 2, "zero_stage": 3}
    assert combinations(recipe(resources=shape), cluster("cpu")) == {(2, 3, "none", "none")}
    asked = recipe(resources=shape | {"offload_optimizer": "cpu"})
    assert combinations(asked, cluster("cpu")) == {(2, 3, "cpu", "none")}


def test_sharding_one_rank_is_not_tried_unasked() -> None:
    for world, stage, optimizer, _ in combinations(recipe(), cluster("t4-16")):
        assert world == 1
        assert stage == 0 or optimizer != "none"


@pytest.mark.parametrize(
    ("batch", "worlds"), [(6, {1, 2}), (7, {1}), (64, {1, 2, 4, 8, 16, 32, 64})]
)
def test_the_global_batch_is_split_exactly(batch: int, worlds: set[int]) -> None:
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
def test_a_global_batch_that_cannot_be_split_says_so(fixed: dict[str, Any]) -> None:
    with pytest.raises(DoesNotFit, match=r"global_batch_size 16 cannot be split.*a multiple of"):
        plan_of(recipe(**fixed), cluster("a100-80"), facts(100_000_000))


def test_fewest_gpu_hours_then_least_offloading() -> None:
    """3 billion × 18 bytes on 39 GiB cards: one takes it with the optimizer on the CPU.

    But two without take less than half the time, which is fewer GPU hours.
    """
    made, site = recipe(), cluster("a100-40")
    small = plan_of(made, site, facts(1_500_000_000)).layout
    assert (small.world_size, small.offload_optimizer) == (1, "none")
    wide = plan_of(made, site, facts(3 * BILLION)).layout
    assert (wide.world_size, wide.offload_optimizer) == (2, "none")
    one = cluster("a100-40", gpus_per_node=1, max_nodes=1)
    assert plan_of(made, one, facts(3 * BILLION)).layout.offload_optimizer == "cpu"


@pytest.mark.parametrize(("most", "steps"), [(1, [1]), (4, [1, 2, 4]), (6, [1, 2, 4, 6])])
def test_doubling(most: int, steps: list[int]) -> None:
    assert powers_of_two(most) == steps


def test_host_memory_binds_too() -> None:
    asked = recipe(resources={"nodes": 1, "gpus_per_node": 4, "zero_stage": 3,
                              "offload_optimizer": "cpu", "offload_param": "cpu"})  # fmt: skip
    with pytest.raises(DoesNotFit, match="of host memory of a node"):
        plan_of(asked, cluster("a100-80", host_memory_gib=64), facts(7 * BILLION))
