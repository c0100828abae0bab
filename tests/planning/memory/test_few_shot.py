"""Plans of prompting: weights, caches and a batch by name; the trace against real tensors."""

from __future__ import annotations

import json
from typing import Any

import pytest

from builders import Cli
from hpcft.config import cluster_profile, recipe
from hpcft.core.records import ModelSpec
from hpcft.jobs.what_fits import plan_run
from hpcft.methods.frozen import Frozen
from hpcft.planning import oom_fallback
from hpcft.planning.memory.few_shot import batch_memory
from hpcft.planning.memory.trace_types import PromptBatch
from hpcft.planning.memory.tracing.few_shot import _peaks, shapes
from hpcft.planning.memory.tracing.target_device import Target
from hpcft.tasks.few_shot.scorer import Scorer
from hpcft.tasks.few_shot.task import FewShot

GEMMA_7B = 8_537_680_896
LAYERS, HEADS, HEAD_WIDTH, WINDOW = 28, 16, 256, 8192

pytestmark = pytest.mark.usefixtures("cache_of_this_module")


def planned(cli: Cli, *arguments: object) -> tuple[dict[str, Any], dict[str, int]]:
    """The plan, and bytes of a GPU by component."""
    said = cli("plan", *arguments, "--uncalibrated", "--json")
    assert said.code == 0, said.err
    return said.json, {item["name"]: item["bytes"] for item in said.json["gpu_memory"]}


def test_gemma_shown_eight_reviews_on_one_gpu(cli: Cli) -> None:
    plan, items = planned(cli, "gemma7b_fewshot", "-c", "a100-40")
    assert plan["layout"]["ranks_per_node"] * plan["layout"]["nodes"] == 1
    assert plan["precision"] == "bf16"
    assert items.pop("weights") == 2 * GEMMA_7B
    assert items.pop("KV cache of the shots") == 2 * LAYERS * HEADS * HEAD_WIDTH * 2 * WINDOW
    # They are of label positions only, and no more than what a layer held before them.
    assert "logits" not in items
    # At least a layer's feed-forward part: three times tokens × F in 16 bits.
    tokens = plan["per_device_eval_batch_size"] * WINDOW
    assert 3 * tokens * 24_576 * 2 * 0.9 < items.pop("activations") < 8 * tokens * 24_576 * 2
    assert set(items) == {"fragmentation", "CUDA context"}, "no gradients, no optimizer"
    assert plan["optim"] == "no optimizer"
    assert plan["time"]["steps"] > 0
    assert plan["gpu_hours"] < 1


def test_a_gpu_that_is_too_small_takes_4_bits_or_shares(cli: Cli) -> None:
    plan, items = planned(cli, "gemma7b_fewshot", "-c", "t4-16", "-o", "method.load_in_4bit=true")
    assert plan["layout"]["zero_stage"] == 0
    assert items["weights"] + items["4-bit weights"] < 0.36 * 2 * GEMMA_7B
    assert items["4-bit weights"] < 0.3 * 2 * GEMMA_7B
    plan, items = planned(cli, "gemma7b_fewshot", "-c", "a100-80", "--gpu-memory", "14GiB",
                          "-o", "resources.offload_param=none")  # fmt: skip
    ranks = plan["layout"]["nodes"] * plan["layout"]["ranks_per_node"]
    assert ranks > 1
    assert plan["layout"]["zero_stage"] == 3
    assert items["weight shards"] == 2 * GEMMA_7B // ranks
    assert 2 * 256_000 * 3072 < items["ZeRO gathers and buckets"] < 4 * 2**30
    plan, items = planned(cli, "gemma7b_fewshot", "-c", "t4-16")
    assert plan["layout"]["offload_param"] == "cpu"
    assert plan["layout"]["offload_optimizer"] == "none"
    assert "weights" not in items
    assert plan["ds_config"]["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert "offload_optimizer" not in plan["ds_config"]["zero_optimization"]


def test_generation_keeps_what_it_has_read(cli: Cli) -> None:
    _, asked = planned(cli, "llama3_8b_mnli_oneshot", "-c", "a100-80")
    token = 2 * 32 * 8 * 128 * 2
    assert asked["KV cache of the shots"] == token * 1024
    assert asked["KV cache of the batch"] == token * 16_384
    _, scored = planned(cli, "llama3_8b_mnli_oneshot", "-c", "a100-80", "-o",
                        "task={answer: likelihood, temperature: 0}")  # fmt: skip
    assert "KV cache of the batch" not in scored


def test_what_is_out_of_memory_asks_less_at_once_then_moves_the_weights() -> None:
    (point,) = recipe.load_recipe("gemma7b_fewshot")
    site = cluster_profile.load_profile("a100-40")
    plan = plan_run(point, site)
    assert plan.per_device_eval_batch_size == 2
    changes = []
    while lower := oom_fallback.next_fallback(plan, point.recipe, site.cluster, "evaluation"):
        changes.append(oom_fallback.describe_change(plan, lower))
        plan = lower
    assert changes == ["evaluation batch 2 → 1", "no sharding → ZeRO-3, parameters on cpu"]


CONFIG: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 3000, "hidden_size": 64, "intermediate_size": 160,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}  # fmt: skip


@pytest.mark.parametrize("prompts", [1, 8])
def test_what_is_traced_is_what_real_tensors_take(prompts: int) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    task = FewShot.model_validate_json(json.dumps({
        "name": "prompting", "prompt": "{text}", "labels": ["bad", "very good"],
        "data": {"path": "x/y"}, "max_length": 200,
    }))  # fmt: skip
    traced = batch_memory(
        PromptBatch(model=ModelSpec(config=CONFIG), task=task, method=Frozen(name="frozen"),
              precision="fp32", accelerator="cpu", prompts=prompts)
    )  # fmt: skip
    config = AutoConfig.for_model(**CONFIG)
    scorer = Scorer(AutoModelForCausalLM.from_config(config), [0])
    choices = [4, 10]
    real = [
        _peaks(scorer, Target("cpu", "fp32"), rows, own, choices)
        for rows, own in shapes(prompts, 200, choices)
    ]
    assert max(a for a, *_ in real) == pytest.approx(traced.activations, rel=0.05)
    assert max(m for *_, m in real) == pytest.approx(traced.activations + traced.logits, rel=0.05)
    assert traced.token == 2 * 3 * 2 * 16 * 4
    assert not traced.copies
