"""Tests plans of few-shot prompting by component, and the trace against real tensors."""

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
from hpcft.planning.memory.tracing.few_shot import batch_shapes, peak_bytes
from hpcft.tasks.few_shot.scorer import Scorer
from hpcft.tasks.few_shot.task import FewShot

GEMMA_7B = 8_537_680_896
LAYERS, HEADS, HEAD_WIDTH, WINDOW = 28, 16, 256, 8192

pytestmark = pytest.mark.usefixtures("cache_of_this_module")


def planned(cli: Cli, *arguments: object) -> tuple[dict[str, Any], dict[str, int]]:
    """Returns the plan, and a GPU's bytes by component."""
    result = cli("plan", *arguments, "--uncalibrated", "--json")
    assert result.code == 0, result.err
    return result.json, {item["name"]: item["bytes"] for item in result.json["gpu_memory"]}


def test_few_shot_plan_of_gemma_7b_fits_one_gpu(cli: Cli) -> None:
    plan, items = planned(cli, "gemma7b_fewshot", "-c", "a100-40")
    assert plan["layout"]["ranks_per_node"] * plan["layout"]["nodes"] == 1
    assert plan["precision"] == "bf16"
    assert items.pop("weights") == 2 * GEMMA_7B
    assert items.pop("KV cache of the shots") == 2 * LAYERS * HEADS * HEAD_WIDTH * 2 * WINDOW
    # Logits are of label positions only, and take no more than the layers before them.
    assert "logits" not in items
    # At least the feed-forward part of a layer: three times tokens × F in 16 bits.
    tokens = plan["per_device_eval_batch_size"] * WINDOW
    assert 3 * tokens * 24_576 * 2 * 0.9 < items.pop("activations") < 8 * tokens * 24_576 * 2
    assert set(items) == {"fragmentation", "CUDA context"}, "no gradients, no optimizer"
    assert plan["optim"] == "no optimizer"
    assert plan["time"]["steps"] > 0
    assert plan["gpu_hours"] < 1


def test_small_gpu_needs_4_bits_or_sharding(cli: Cli) -> None:
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
    plan, items = planned(cli, "gemma7b_fewshot", "-c", "v100-16",
                          "-o", "resources.offload_param=cpu")  # fmt: skip
    assert plan["layout"]["offload_param"] == "cpu"
    assert plan["layout"]["offload_optimizer"] == "none"
    assert "weights" not in items
    assert plan["ds_config"]["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert "offload_optimizer" not in plan["ds_config"]["zero_optimization"]


def test_generation_keeps_the_cache_of_the_batch(cli: Cli) -> None:
    _, generating = planned(cli, "llama3_8b_mnli_oneshot", "-c", "a100-80")
    token = 2 * 32 * 8 * 128 * 2
    assert generating["KV cache of the shots"] == token * 1024
    assert generating["KV cache of the batch"] == token * 16_384
    _, scoring = planned(cli, "llama3_8b_mnli_oneshot", "-c", "a100-80", "-o",
                        "task={answer: likelihood, temperature: 0}")  # fmt: skip
    assert "KV cache of the batch" not in scoring


def test_fallbacks_halve_the_batch_then_offload_the_weights() -> None:
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
def test_traced_batch_equals_real_tensors(prompts: int) -> None:
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
        peak_bytes(scorer, rows, tokens, choices)
        for rows, tokens in batch_shapes(prompts, 200, choices)
    ]
    with_logits = traced.activation_bytes + traced.logits_bytes
    assert max(a for a, *_ in real) == pytest.approx(traced.activation_bytes, rel=0.05)
    assert max(m for *_, m in real) == pytest.approx(with_logits, rel=0.05)
    assert traced.kv_bytes_per_token == 2 * 3 * 2 * 16 * 4
    assert not traced.copies_prefix
