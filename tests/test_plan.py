"""Plans: every shipped recipe on every shipped profile, memory by hand, nonsense, exact counts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, Cli
from hpcft import recipe as recipes
from hpcft.cluster import profile
from hpcft.errors import DataError, DoesNotFit, InputError
from hpcft.fits import plan_point
from hpcft.layouts import doubling, layouts, precision_of, problems
from hpcft.memory import cache, device, parameters, zero
from hpcft.memory.states import host_states, lasting_bytes, loading_bytes
from hpcft.recipe import FullRecipe
from hpcft.records import Cluster, DataSpec, Layout, ModelFacts, ModelSpec, ParameterCount
from hpcft.tasks import Instruction
from hpcft.units import GIB
from made_plans import make

RECIPES = sorted(file.stem for file in (ROOT / "recipes").glob("*.yaml"))
BILLION = 1_000_000_000


@pytest.fixture(scope="module", autouse=True)
def _facts_of_this_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of this module's own: models are counted once, by today's code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def cluster(name: str, **changes: Any) -> Cluster:
    """A shipped profile with fields changed."""
    return profile.load(name).cluster.model_copy(update=changes)


CLASSIFY = {"name": "classification", "labels": ["a", "b"], "data": {"path": "x/y"}}
COMPLETE = {"name": "instruction", "prompt": "{q}", "completion": "{a}", "data": {"path": "x/y"}}


def recipe(**sections: Any) -> FullRecipe:
    """A recipe from its sections, with the rest made up."""
    made: dict[str, Any] = {"name": "made", "model": {"path": "x/y"}, "task": dict(CLASSIFY),
                            "method": {"name": "full"}, **sections}  # fmt: skip
    return FullRecipe.model_validate(made)


def facts(total: int = BILLION, **changes: Any) -> ModelFacts:
    """A decoder of round numbers; `trainable` and the like are its counts."""
    counted = {"trainable": total, "added": 0, "largest_layer": total // 10, "quantised": 0,
               "looked_up": 0, "layer": total // 20, "largest_trained": total // 10}  # fmt: skip
    counts = {key: changes.pop(key, value) for key, value in counted.items()}
    shape: dict[str, Any] = {
        "model_type": "llama", "layers": 16, "hidden_size": 2048, "intermediate_size": 8192,
        "attention_heads": 32, "vocab_size": 32000, "logits_width": 32000,
        "logits_positions": "tokens", "max_positions": 4096,
    }  # fmt: skip
    return ModelFacts(parameters=ParameterCount(total=total, **counts), **(shape | changes))


def layout(stage: int, ranks: int = 1, **changes: Any) -> Layout:
    """One node of so many ranks."""
    fields: dict[str, Any] = {
        "nodes": 1, "ranks_per_node": ranks, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1, "gradient_checkpointing": False, "zero_stage": stage,
        "offload_optimizer": "none", "offload_param": "none",
    }  # fmt: skip
    return Layout(**(fields | changes))


# ---------------------------------------------------------------- what ships


# One of each kind: with bfloat16 and without. `docs/fits.md` has the rest.
@pytest.mark.parametrize("site", ["a100-80", "t4-16"])
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_fits_or_is_refused_with_a_change_that_would(name: str, site: str) -> None:
    (point,) = recipes.load(str(ROOT / "recipes" / f"{name}.yaml"))
    known = profile.load(site)
    try:
        plan = plan_point(point, known)
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
    assert batch * found.world_size == point.recipe.train.global_batch_size
    if plan.ds_config is not None:
        assert plan.ds_config["train_batch_size"] == point.recipe.train.global_batch_size
    assert (plan.ds_config is None) == (found.zero_stage == 0)


def test_gemma_in_full_is_refused_on_a_t4() -> None:
    (point,) = recipes.load("gemma7b_full")
    with pytest.raises(DoesNotFit) as refused:
        plan_point(point, profile.load("t4-16"))
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
        make(made, site, facts(3 * BILLION))
    freed = recipe(task=COMPLETE, **(tight | {"resources": {"nodes": 1, "gpus_per_node": 1}}))
    assert make(freed, site, facts(3 * BILLION)).layout.offload_optimizer == "cpu"


def test_quickstart_fits_this_machine(cli: Cli) -> None:
    said = cli("plan", "quickstart", "-c", "local", "--json")
    assert said.code == 0, said.err
    shown = said.json
    assert shown["layout"]["zero_stage"] == 3
    assert shown["facts"]["parameters"]["total"] == 240_901
    assert shown["gpu_peak_bytes"] == sum(item["bytes"] for item in shown["gpu_memory"])


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
    least = lasting_bytes(facts(), method, layout(stage, ranks), precision, "adamw_torch")
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
    items = zero.lasting(facts(), layout(stage, 4, **changes), "bf16", "adamw_torch")
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
        (3, "bf16", "adamw_torch", False, 4 + 8),
    ],
)
def test_the_optimizers_work_by_hand(
    stage: int, precision: Any, optim: str, on_gpu: bool, bytes_each: float
) -> None:
    (item,) = zero.passing("optimizer", facts(), layout(stage, 4), precision, optim, on_gpu=on_gpu)
    assert item.bytes == pytest.approx(bytes_each * BILLION / 4)


@pytest.mark.parametrize(
    ("stage", "optimizer", "param", "host_each"),
    [(2, "cpu", "none", 16), (3, "cpu", "none", 16), (3, "cpu", "cpu", 18), (3, "nvme", "none", 0)],
)
def test_offloading_by_hand(stage: int, optimizer: str, param: str, host_each: float) -> None:
    """DeepSpeed's memory.rst: 1.5 × 16 or 18 bytes over the nodes."""
    laid = layout(stage, 4, offload_optimizer=optimizer, offload_param=param)
    method = recipe().method
    host = {i.name: i.bytes for i in host_states(facts(), method, laid, "bf16", load_bytes=0)}
    assert host.get("offloaded states", 0) == pytest.approx(1.5 * host_each * BILLION)


def test_rank_0_collects_whole_weights_to_save_them() -> None:
    method, laid = recipe().method, layout(3, 4)
    host = {i.name: i.bytes for i in host_states(facts(), method, laid, "bf16", load_bytes=10)}
    assert host["saving"] == 2 * BILLION
    assert "loading" not in host, "which is over by then"


@pytest.mark.parametrize(("double", "each"), [(True, 0.516), (False, 0.563)])
def test_qlora_by_hand(double: bool, each: float) -> None:
    """A base of 7 billion: 6 in 4 bits, the rest as fp32 (PEFT's preparation), adapters trained."""
    method = recipe(method={"name": "qlora", "bnb_4bit_use_double_quant": double}).method
    counts = facts(7_020_000_000, trainable=20_000_000, quantised=6_000_000_000)
    one = lasting_bytes(counts, method, layout(0), "bf16", "adamw_torch")
    assert one == pytest.approx(each * 6e9 + 4e9 + 12 * 20e6, rel=1e-3)
    paged = lasting_bytes(counts, method, layout(0), "bf16", "paged_adamw_8bit")
    assert one - paged == pytest.approx(6 * 20e6, rel=0.01)
    sharded = lasting_bytes(counts, method, layout(2, 4), "bf16", "adamw_torch")
    assert sharded == pytest.approx(each * 6e9 + 2e9 + (2 + 12 / 4) * 20e6, rel=1e-3)


def test_lora_under_zero3_moves_the_frozen_weights_too() -> None:
    method = recipe(method={"name": "lora"}).method
    counts = facts(8 * BILLION, trainable=10_000_000)
    items = {i.name: i.bytes for i in zero.lasting(counts, layout(3, 4), "bf16", "adamw_torch")}
    assert items["weight shards"] == 2 * 8 * BILLION // 4
    laid = layout(3, 4, offload_optimizer="cpu", offload_param="cpu")
    moved = {i.name for i in zero.lasting(counts, laid, "bf16", "adamw_torch")}
    assert "weight shards" not in moved
    host = {i.name: i.bytes for i in host_states(counts, method, laid, "bf16", load_bytes=0)}
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
    made = make(two, cluster("a100-80"), facts(), load_bytes=10)
    rank = {item.name: item.bytes for item in made.gpu_memory}
    outside = ("fragmentation", "CUDA context", "communicator buffers")
    tensors = sum(size for name, size in rank.items() if name not in outside)
    assert rank["fragmentation"] == int(device.FRAGMENTATION * tensors)
    assert rank["CUDA context"] == rank["communicator buffers"] == GIB // 2
    assert rank["gradient buckets"] == 4 * BILLION
    host = {item.name: item.bytes for item in made.host_memory}
    assert host["loading"] == 2 * 4 * BILLION
    assert host["processes"] == 2 * 1.5 * GIB
    assert made.mem_mib == int(1.25 * sum(host.values()) / 2**20)


def test_on_a_cpu_the_ranks_share_the_nodes_memory() -> None:
    two = recipe(resources={"nodes": 1, "gpus_per_node": 2, "zero_stage": 0})
    made = make(two, cluster("cpu"), facts(), load_bytes=10)
    host = {item.name: item.bytes for item in made.host_memory}
    process = 3 * GIB // 2
    assert host["training on the CPU"] == 2 * (made.gpu_peak_bytes - process)
    assert host["loading"] == 20
    assert made.gpu_capacity_bytes == 120 * GIB


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
    assert problems(made, cluster(site), facts()) == []
    assert precision_of(made, cluster(site)) == expected


def test_gemma_in_float16_is_warned_of() -> None:
    small = facts(100_000_000, model_type="gemma")
    (warning,) = make(recipe(), cluster("v100-16"), small).warnings
    assert "gemma overflows in float16 and V100-SXM2-16GB has no bfloat16" in warning
    assert make(recipe(), cluster("a100-80"), small).warnings == []
    assert make(recipe(), cluster("v100-16"), facts(100_000_000)).warnings == []


# ---------------------------------------------------------------- nonsense


NVME = {"node_disk_path": "/local", "node_disk_gib": 1000.0}


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
    found = problems(recipe(**sections), cluster(site), facts())
    assert [".".join(map(str, loc)) for loc, _, _ in found] == [field]
    assert what in found[0][1]
    assert found[0][2], "every problem says how to mend it"


def test_nvme_is_accepted_where_there_is_a_disk() -> None:
    asked = recipe(resources={"offload_optimizer": "nvme", "offload_param": "nvme"})
    assert problems(asked, cluster("a100-80", **NVME), facts()) == []


def test_too_long_for_roberta_counts_its_reserved_positions() -> None:
    """514 rows of position embeddings take 512 tokens: counting starts behind the padding's."""
    (point,) = recipes.load("roberta_mnli_full", ["task.max_length=513"])
    model, task, method = point.recipe.model, point.recipe.task, point.recipe.method
    counted = parameters.facts(model, task, method)
    assert counted.max_positions == 512
    (found,) = problems(point.recipe, cluster("a100-80"), counted)
    assert "at most 512 tokens, got 513" in found[1]


# ---------------------------------------------------------------- layouts


def combinations(made: FullRecipe, site: Cluster) -> set[tuple[int, int, str, str]]:
    """World size, stage and offloading of all layouts."""
    return {(x.world_size, x.zero_stage, x.offload_optimizer, x.offload_param)
            for x in layouts(made, site)}  # fmt: skip


def test_zero3_fixed_on_one_rank_is_kept() -> None:
    one = {"nodes": 1, "gpus_per_node": 1, "zero_stage": 3}
    assert combinations(recipe(resources=one), cluster("cpu")) == {(1, 3, "none", "none")}
    assert (1, 3, "cpu", "none") in combinations(recipe(resources=one), cluster("a100-80"))
    plan = make(recipe(resources=one), cluster("a100-80"), facts(100_000_000))
    assert plan.layout.zero_stage == 3
    assert plan.ds_config is not None


def test_a_fixed_stage_leaves_offloading_to_the_plan() -> None:
    fixed = recipe(resources={"nodes": 1, "gpus_per_node": 4, "zero_stage": 2})
    assert combinations(fixed, cluster("a100-80")) == {
        (4, 2, "none", "none"),
        (4, 2, "cpu", "none"),
    }
    fits = make(fixed, cluster("a100-40"), facts(7 * BILLION))
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
    found = list(layouts(made, cluster("a100-80")))
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
        make(recipe(**fixed), cluster("a100-80"), facts(100_000_000))


def test_fewest_gpu_hours_then_least_offloading() -> None:
    """3 billion × 18 bytes on 39 GiB cards: one takes it with the optimizer on the CPU.

    But two without take less than half the time, which is fewer GPU hours.
    """
    made, site = recipe(), cluster("a100-40")
    small = make(made, site, facts(1_500_000_000)).layout
    assert (small.world_size, small.offload_optimizer) == (1, "none")
    wide = make(made, site, facts(3 * BILLION)).layout
    assert (wide.world_size, wide.offload_optimizer) == (2, "none")
    one = cluster("a100-40", gpus_per_node=1, max_nodes=1)
    assert make(made, one, facts(3 * BILLION)).layout.offload_optimizer == "cpu"


@pytest.mark.parametrize(("most", "steps"), [(1, [1]), (4, [1, 2, 4]), (6, [1, 2, 4, 6])])
def test_doubling(most: int, steps: list[int]) -> None:
    assert doubling(most) == steps


def test_host_memory_binds_too() -> None:
    asked = recipe(resources={"nodes": 1, "gpus_per_node": 4, "zero_stage": 3,
                              "offload_optimizer": "cpu", "offload_param": "cpu"})  # fmt: skip
    with pytest.raises(DoesNotFit, match="of host memory of a node"):
        make(asked, cluster("a100-80", host_memory_gib=64), facts(7 * BILLION))


# ---------------------------------------------------------------- exact counts


LLAMA = {"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8}
LLAMA_1B = LLAMA | {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
                    "num_hidden_layers": 16, "head_dim": 64,
                    "tie_word_embeddings": True}  # fmt: skip
LLAMA_8B = LLAMA | {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
                    "num_hidden_layers": 32}  # fmt: skip
MISTRAL = LLAMA_8B | {"model_type": "mistral", "vocab_size": 32000}
GEMMA = {"model_type": "gemma", "vocab_size": 256128, "hidden_size": 3072, "num_hidden_layers": 28,
         "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256,
         "intermediate_size": 24576}  # fmt: skip
BERT = {"model_type": "bert"}
DISTIL = {"model_type": "distilbert"}
ROBERTA = {"model_type": "roberta", "vocab_size": 50265, "hidden_size": 1024, "type_vocab_size": 1,
           "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
           "max_position_embeddings": 514}  # fmt: skip
THREE = CLASSIFY | {"labels": ["a", "b", "c"]}
ROBERTA_HEAD = 1024 * 1024 + 1024 + 3 * 1024 + 3


@pytest.mark.parametrize(
    ("config", "task", "method", "total", "trainable", "added"),
    [
        pytest.param(BERT, CLASSIFY, {"name": "full"}, 109_483_778, 109_483_778, 1538, id="bert"),
        pytest.param(DISTIL, CLASSIFY, {"name": "full"}, 66_362_880 + 592_130,
                     66_362_880 + 592_130, 592_130, id="distilbert"),
        pytest.param(ROBERTA, THREE, {"name": "full"}, 355_362_819, 355_362_819, ROBERTA_HEAD,
                     id="roberta-large"),
        # PEFT trains a copy of the head; the first one stays, frozen, and is counted as PEFT does.
        pytest.param(ROBERTA, THREE, {"name": "lora", "r": 8, "target_modules": ["query", "value"]},
                     355_362_819 + 1_839_107, 1_839_107, 1_839_107, id="roberta-large-lora"),
        pytest.param(LLAMA_1B, COMPLETE, {"name": "full"}, 1_235_814_400, 1_235_814_400, 0,
                     id="llama-1b"),
        pytest.param(GEMMA, COMPLETE, {"name": "full"}, 786_825_216 + 7_751_248_896,
                     786_825_216 + 7_751_248_896, 0, id="gemma-7b"),
        pytest.param(MISTRAL, COMPLETE, {"name": "full"}, 7_241_732_096, 7_241_732_096, 0,
                     id="mistral-7b"),
        pytest.param(LLAMA_8B, THREE,
                     {"name": "qlora", "r": 64,
                      "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
                     7_504_924_672 + 12_288 + 54_538_240, 54_538_240, 54_538_240,
                     id="llama-8b-qlora"),
    ],
)  # fmt: skip
def test_exact_parameters(
    config: dict[str, Any], task: dict[str, Any], method: dict[str, Any], total: int,
    trainable: int, added: int,
) -> None:  # fmt: skip
    made = recipe(model={"path": "x/y", "config": config}, task=task, method=method)
    found = parameters.facts(made.model, made.task, made.method).parameters
    assert (found.total, found.trainable, found.added) == (total, trainable, added)


@pytest.mark.parametrize(
    ("config", "task", "looked_up"),
    [
        pytest.param(LLAMA_8B, COMPLETE, 128256 * 4096, id="untied"),
        pytest.param(LLAMA_1B, COMPLETE, 0, id="tied: the table is the output layer too"),
        pytest.param(BERT, CLASSIFY, (30522 + 512 + 2) * 768, id="bert: words, positions, types"),
    ],
)
def test_tables_that_are_looked_up(config: dict[str, Any], task: Any, looked_up: int) -> None:
    made = recipe(model={"path": "x/y", "config": config}, task=task)
    assert parameters.facts(made.model, made.task, made.method).parameters.looked_up == looked_up


@pytest.mark.parametrize(
    ("config", "task", "quantised"),
    [
        # All linear layers of the blocks; embeddings, norms and head stay out.
        pytest.param(LLAMA_8B, COMPLETE, 32 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336), id="llama"),
        pytest.param(BERT, CLASSIFY, 12 * (4 * 768**2 + 2 * 768 * 3072) + 768**2, id="bert"),
        pytest.param(ROBERTA, THREE, 24 * (4 * 1024**2 + 2 * 1024 * 4096), id="roberta"),
        pytest.param(DISTIL, CLASSIFY, 6 * (4 * 768**2 + 2 * 768 * 3072), id="distilbert"),
    ],
)  # fmt: skip
def test_quantised_weights(config: dict[str, Any], task: dict[str, Any], quantised: int) -> None:
    method = {"name": "qlora", "target_modules": ["q_proj", "query", "q_lin"]}
    made = recipe(model={"path": "x/y", "config": config}, task=task, method=method)
    assert parameters.facts(made.model, made.task, made.method).parameters.quantised == quantised


def test_heads_are_kept_out_of_4_bits(tmp_path: Path) -> None:
    """What transformers quantises with our options is what was counted, for an encoder too."""
    import torch
    from transformers import AutoModelForSequenceClassification, RobertaConfig

    config = {"model_type": "roberta", "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 2, "intermediate_size": 64}  # fmt: skip
    bare = AutoModelForSequenceClassification.from_config(RobertaConfig(**config))
    bare.save_pretrained(tmp_path)
    made = recipe(model={"path": "x/y", "config": config}, method={"name": "qlora", "r": 2})
    options = made.method.load_options("fp32", 0) | {"device_map": {"": "cpu"}}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, **options)
    held = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert not [name for name in held if "classifier" in name]
    shapes = {name: module for name, module in bare.named_modules() if name in held}
    assert all(isinstance(module, torch.nn.Linear) for module in shapes.values())
    counted = parameters.facts(made.model, made.task, made.method).parameters
    assert sum(module.weight.numel() for module in shapes.values()) == counted.quantised


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "nope"}, "no usable configuration"),
        ({"model_type": "bert", "hidden_size": "big"}, "hidden_size"),
        ({"model_type": "bert", "num_attention_heads": 7}, "multiple of the number of attention"),
        ({"model_type": "bert", "hidden_act": "nope"}, "KeyError: 'nope'"),
        ({"model_type": "bert", "num_attention_heads": 0}, "expected a positive number"),
    ],
)
def test_an_impossible_architecture_is_told(config: dict[str, Any], says: str) -> None:
    made = recipe(model={"path": "x/y", "config": config})
    with pytest.raises(DataError, match=r"^model") as told:
        parameters.facts(made.model, made.task, made.method)
    assert says in str(told.value)
    assert len(str(told.value).splitlines()) <= 2


def test_modules_that_the_model_lacks_are_told() -> None:
    made = recipe(model={"path": "x/y", "config": BERT},
                  method={"name": "lora", "target_modules": ["q_proj"]})  # fmt: skip
    with pytest.raises(DataError, match=r"^method\.lora: No modules were targeted"):
        parameters.facts(made.model, made.task, made.method)


# ---------------------------------------------------------------- the cache of counts


SECOND_CALL = """
import json, sys
from hpcft import recipe
from hpcft.memory import parameters
made = recipe.FullRecipe.model_validate(json.loads(sys.argv[1]))
print(parameters.facts(made.model, made.task, made.method).parameters.total)
print("torch" in sys.modules, "transformers" in sys.modules, "peft" in sys.modules)
"""


def test_counts_are_read_from_the_cache_without_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tiny = {"model_type": "bert", "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "intermediate_size": 64}  # fmt: skip
    made = recipe(model={"path": "x/y", "config": tiny})
    first = parameters.facts(made.model, made.task, made.method)
    (file,) = (tmp_path / "hpcft" / "facts").iterdir()
    text = json.dumps(made.model_dump(mode="json", exclude_none=True))
    done = subprocess.run([sys.executable, "-c", SECOND_CALL, text], capture_output=True, text=True,
                          timeout=60, check=True)  # fmt: skip
    assert done.stdout.split() == [str(first.parameters.total), "False", "False", "False"]

    marked = first.model_copy(update={"layers": 77})
    file.write_text(marked.model_dump_json())
    cache._read.clear()  # as in a new process
    assert parameters.facts(made.model, made.task, made.method) == marked, "the file is read"
    for damage in ("", "{", '{"model_type": "bert"}', "\x00\xff"):
        file.write_bytes(damage.encode("latin-1"))
        cache._read.clear()
        assert parameters.facts(made.model, made.task, made.method) == first
        assert ModelFacts.model_validate_json(file.read_text()) == first


def test_a_cache_that_cannot_be_written_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hpcft").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = recipe(model={"path": "x/y", "config": {"model_type": "distilbert", "n_layers": 1}})
    assert parameters.facts(made.model, made.task, made.method).layers == 1


# ---------------------------------------------------------------- weights that are read


def test_the_largest_weight_file_counts(tmp_path: Path) -> None:
    for name, size in (("model-1.safetensors", 10), ("model-2.safetensors", 30)):
        (tmp_path / name).write_bytes(bytes(size))
    local = recipe(model={"path": str(tmp_path)}).model
    assert parameters.largest_weight_file_bytes(local, facts()) == 30
    hub = recipe().model
    assert parameters.largest_weight_file_bytes(hub, facts(BILLION)) == 4 * BILLION
    assert parameters.largest_weight_file_bytes(hub, facts(70 * BILLION)) == 5 * GIB


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("hidden_sizee=64", "model.config.hidden_sizee: unknown key of a bert model; did you mean"),
        ("num_hidden_layers=-1", "model.config.num_hidden_layers: expected a positive number"),
        ("model_type=fooo", "Unrecognized model identifier"),
    ],
)
def test_described_architecture_is_checked(cli: Cli, tiny: Path, change: str, said: str) -> None:
    """`transformers` takes a misspelt field in silence, and a model of another size is trained."""
    refused = cli("plan", tiny, "-c", "local", "-o", f"model.config.{change}")
    assert refused.code == 2
    assert said in refused.err
    assert "Traceback" not in refused.err


def test_run_never_trains_a_hub_model_by_its_description() -> None:
    """What a recipe tells of a hub model is for planning; what it leaves out would be defaults."""
    described = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}
    spec = ModelSpec(path="nobody/not-in-the-cache", config=described)
    task = Instruction(
        name="instruction", data=DataSpec(files={"train": "x"}), prompt="{a}", completion="{b}"
    )
    assert parameters.model_config(spec, task, to_plan=True).hidden_size == 64
    with pytest.raises(DataError, match="no usable configuration of nobody/not-in-the-cache"):
        parameters.model_config(spec, task)
