"""Compares packed with padded batches: loss, gradients, and which runs are packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.errors import InputError, Problem
from hpcft.core.records import Cluster, ModelFacts
from hpcft.planning.inputs import PlanInputs
from hpcft.planning.resource_checks import check_resources
from hpcft.tasks import packing
from hpcft.tasks.base import IGNORE_INDEX, ModelInputs
from hpcft.tasks.chunked_loss import make_loss

LENGTHS = (9, 3, 14, 1, 6)
WINDOW = 4  # shorter than most examples
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 211,
         "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
         "max_position_embeddings": 128, "sliding_window": WINDOW}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "glm4": {"head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
             "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": {"hidden_dropout": 0.0, "attention_dropout": 0.0},
    "mixtral": {"num_local_experts": 4},
    "phi": {"num_key_value_heads": 4},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"head_dim": 8, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
                  "moe_intermediate_size": 16},
    "smollm3": {"use_sliding_window": True},
}  # fmt: skip
WINDOWED = {"gemma3_text", "mistral", "mixtral", "olmo3", "phi3", "qwen2", "qwen3", "starcoder2"}
# These types mix the tokens of a row in their own ways.
NOT_PACKED: dict[str, dict[str, Any]] = {
    "falcon": {"alibi": True, "num_kv_heads": 2},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
    "qwen3_next": {"head_dim": 8},
}

TASK = {"name": "instruction", "prompt": "{q}", "completion": "{a}", "max_length": 16,
        "data": {"files": {"train": "a.jsonl", "test": "b.jsonl"}}}  # fmt: skip


def recipe(**changed: Any) -> FullRecipe:
    made = {"name": "made", "model": {"path": "x/y"}, "task": TASK, "method": {"name": "full"}}
    return FullRecipe.model_validate(made | changed)


def examples(lengths: tuple[int, ...] = LENGTHS) -> list[ModelInputs]:
    draw = torch.Generator().manual_seed(3)
    rows = []
    for length in lengths:
        ids = torch.randint(1, 200, (length,), generator=draw).tolist()
        labels = [IGNORE_INDEX] * (length // 3) + ids[length // 3 :]
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels})
    return rows


def padded(rows: list[ModelInputs]) -> dict[str, Any]:
    widest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE_INDEX}
    return {
        name: torch.tensor([row[name] + [value] * (widest - len(row[name])) for row in rows])
        for name, value in fill.items()
    }


def model_of(model_type: str, **more: Any) -> Any:
    set_seed(0)
    config = AutoConfig.for_model(model_type, **(SHAPE | OWN.get(model_type, {}) | more))
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()


def losses_and_gradients(
    model: Any, batches: list[dict[str, Any]], chunks: int = 1
) -> tuple[float, dict[str, Any]]:
    """Returns loss and gradients of a global batch that is split into these micro-batches."""
    model.zero_grad()
    items = sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in batches)
    task_loss = make_loss(recipe().task, model, chunks)
    total = 0.0
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        loss = task_loss(model(**inputs, use_cache=False), batch["labels"], items, 0.0)
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def max_difference(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Returns the largest relative difference of a gradient."""
    assert found.keys() == expected.keys()
    return max(
        float(torch.norm(found[name] - gradient) / (torch.norm(gradient) + 1e-9))
        for name, gradient in expected.items()
    )


# ---------------------------------------------------------------- the same loss and gradients


@pytest.mark.process
@pytest.mark.parametrize("model_type", sorted(packing.MODEL_TYPES))
def test_pack_gives_loss_and_gradients_of_padded_batch(model_type: str) -> None:
    model, rows = model_of(model_type), examples()
    loss, gradients = losses_and_gradients(model, [padded(rows)])
    model.set_attn_implementation(packing.register_attention())
    row = packing.pack(rows)
    assert row["input_ids"].shape == (1, sum(LENGTHS))
    packed_loss, found = losses_and_gradients(model, [row])
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert max_difference(found, gradients) < 1e-4
    again, found = losses_and_gradients(model, [padded(rows)])
    assert again == pytest.approx(loss, rel=1e-6), "the attention also takes padded batches"


@pytest.mark.parametrize("model_type", sorted(WINDOWED))
def test_pack_sliding_window_changes_the_loss(model_type: str) -> None:
    """The windows are shorter than the examples, so that the test above covers them."""
    rows = [packing.pack(examples())]
    model = model_of(model_type)
    model.set_attn_implementation(packing.register_attention())
    narrow, _ = losses_and_gradients(model, rows)
    model = model_of(model_type, sliding_window=100)
    model.set_attn_implementation(packing.register_attention())
    wide, _ = losses_and_gradients(model, rows)
    assert abs(narrow - wide) > 1e-4


@pytest.mark.process
@pytest.mark.parametrize("model_type", sorted(NOT_PACKED))
def test_packs_is_false_for_models_that_mix_a_row(model_type: str) -> None:
    """Packing would change their gradients, so they are not packed."""
    model, rows = model_of(model_type, **NOT_PACKED[model_type]), examples()
    _, gradients = losses_and_gradients(model, [padded(rows)])
    model.set_attn_implementation(packing.register_attention())
    _, found = losses_and_gradients(model, [packing.pack(rows)])
    assert max_difference(found, gradients) > 1e-3
    assert not recipe().packs(model_type)


@pytest.mark.parametrize("option", ["checkpointing", "chunks", "lora", "bf16"])
def test_pack_with_options_of_a_run_equals_padded(option: str) -> None:
    found = []
    for batch in (padded(examples()), packing.pack(examples())):
        model = model_of("mistral")
        if "lengths" in batch:
            model.set_attn_implementation(packing.register_attention())
        if option == "checkpointing":
            model.gradient_checkpointing_enable()
        if option == "lora":
            method = {"name": "lora", "r": 4, "target_modules": "all-linear"}
            model = recipe(method=method).method.wrap(model, causal=True, checkpointing=False)
        if option == "bf16":
            model = model.bfloat16()
        found.append(losses_and_gradients(model, [batch], 3 if option == "chunks" else 1))
    (loss, gradients), (packed_loss, of_packed) = found
    assert packed_loss == pytest.approx(loss, rel=1e-2 if option == "bf16" else 1e-5)
    assert max_difference(of_packed, gradients) < (0.1 if option == "bf16" else 1e-4)


@pytest.mark.parametrize("max_tokens", [1, 12, 15, 33])
def test_split_packed_gives_loss_and_gradients_of_whole_row(max_tokens: int) -> None:
    """A step that ran out of memory is repeated in such parts."""
    model, row = model_of("llama"), packing.pack(examples())
    model.set_attn_implementation(packing.register_attention())
    loss, gradients = losses_and_gradients(model, [row])
    parts = packing.split_packed(row, max_tokens)
    assert [n for part in parts for n in part["lengths"]] == list(LENGTHS)
    for part in parts:
        assert part["input_ids"].shape[1] == sum(part["lengths"])
        assert len(part["lengths"]) == 1 or sum(part["lengths"]) <= max_tokens
    found, of_parts = losses_and_gradients(model, parts)
    assert found == pytest.approx(loss, rel=1e-5)
    assert max_difference(of_parts, gradients) < 1e-4


# ---------------------------------------------------------------- which runs


@pytest.mark.parametrize(
    ("changed", "model_type", "why"),
    [
        ({}, "llama", None),
        ({"method": {"name": "lora"}}, "gemma3_text", None),
        ({"method": {"name": "qlora"}}, "mistral", None),
        ({}, "gemma2", "gemma2"),
        ({"method": {"name": "frozen"}}, "llama", "frozen takes no steps"),
        ({"method": {"name": "p_tuning"}}, "llama", "p_tuning puts tokens in front"),
        ({"model": {"path": "x/y", "attn_implementation": "eager"}}, "llama", "eager"),
        ({"task": {"name": "classification", "labels": ["a", "b"], "data": TASK["data"]}},
         "llama", "classification"),
    ],
    ids=["full", "lora", "qlora", "model", "frozen", "prompts", "attention", "task"],
)  # fmt: skip
def test_packing_blocker_by_method_model_and_task(
    changed: dict[str, Any], model_type: str, why: str | None
) -> None:
    auto = recipe(**changed)
    assert auto.packs(model_type) is (why is None)
    off = auto.model_copy(update={"train": auto.train.model_copy(update={"packing": False})})
    assert not off.packs(model_type)
    forced = auto.model_copy(update={"train": auto.train.model_copy(update={"packing": True})})
    site = Cluster(name="here", scheduler="local", accelerator="cpu", cores_per_node=2,
                   host_memory_gib=8)  # fmt: skip
    count = {"total": 9, "trainable": 9, "added": 0, "largest_layer": 9}
    facts = ModelFacts.model_validate(
        {"model_type": model_type, "parameters": count, "layers": 1, "hidden_size": 1,
         "vocab_size": 9, "logits_width": 9}
    )  # fmt: skip
    problems: list[Problem] = []
    try:
        check_resources(PlanInputs(forced, site, facts), lambda key: "recipe.yaml")
    except InputError as error:
        problems = error.problems
    texts = [problem.what for problem in problems if problem.key == "train.packing"]
    assert [why in text for text in texts if why] == [True] * (why is not None)


# ---------------------------------------------------------------- ranks without examples


def test_pack_example_without_labels_adds_nothing() -> None:
    rows = examples((9, 3, 14))
    blank = {**rows[1], "labels": [IGNORE_INDEX] * 3}
    model = model_of("llama")
    model.set_attn_implementation(packing.register_attention())
    batches = [packing.pack(rows), packing.pack([blank])]
    loss, gradients = losses_and_gradients(model, batches[:1])
    with_blank, found = losses_and_gradients(model, batches)
    assert with_blank == pytest.approx(loss, rel=1e-7)
    assert max_difference(found, gradients) < 1e-6
