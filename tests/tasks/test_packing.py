"""Compares packed with padded batches, and the steps of a run on different layouts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

import builders
from builders import llama_folder
from hpcft.config.recipe_types import FullRecipe
from hpcft.core.errors import InputError, Problem
from hpcft.core.records import Cluster, ModelFacts
from hpcft.planning import model_facts
from hpcft.planning.inputs import PlanInputs
from hpcft.planning.resource_checks import check_resources
from hpcft.tasks import packing
from hpcft.tasks.base import IGNORE_INDEX, ModelInputs
from hpcft.tasks.chunked_loss import make_loss
from hpcft.training.data.batch_order import BatchPlan, MicroBatchDataset, plan_batches
from hpcft.training.data.prepare import PreparedSplit
from hpcft.training.distributed.rank_env import RankInfo
from hpcft.training.modes import finetune
from hpcft.training.trainer.model import load_model

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


# ---------------------------------------------------------------- the order


def order_of(lengths: list[int], **changed: Any) -> BatchPlan:
    made: dict[str, Any] = {"global_batch": 8, "strategy": "random", "seed": 1, "epochs": 2,
                            "ranks": 1, "max_accumulation": 1, "max_tokens": None}  # fmt: skip
    return BatchPlan(lengths=lengths, **made | changed)


def by_step(order: BatchPlan, epoch: int) -> Iterator[list[tuple[int, ...]]]:
    """Yields the micro-batches of each step, of all ranks."""
    turns = list(order.micro_batches(epoch))
    each = order.ranks * order.accumulation
    assert len(turns) % each == 0
    return (turns[at : at + each] for at in range(0, len(turns), each))


SOME = st.lists(st.integers(1, 16), min_size=1, max_size=60)
LAYOUTS = [(1, 1, 8), (1, 4, 2), (2, 2, 2), (4, 1, 2), (8, 1, 1)]  # ranks, accumulated, micro-batch


@given(SOME, st.sampled_from(["random", "sequential", "group_by_length"]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_batch_plan_steps_are_the_same_on_every_layout(
    lengths: list[int], strategy: str, packs: bool
) -> None:
    for epoch in (0, 1):
        seen = set()
        for ranks, planned, micro_batch in LAYOUTS:
            room = micro_batch * 16 if packs else None
            order = order_of(lengths, strategy=strategy, ranks=ranks, max_accumulation=planned,
                             max_tokens=room)  # fmt: skip
            assert order.accumulation <= planned
            steps = []
            for groups in by_step(order, epoch):
                for group in groups:
                    if packs:
                        assert sum(lengths[i] for i in group) <= micro_batch * 16
                    else:
                        assert len(group) <= micro_batch
                steps.append(tuple(sorted(i for group in groups for i in group)))
            assert sorted(itertools.chain(*steps)) == list(range(len(lengths)))
            assert all(len(step) == 8 for step in steps if step != steps[-1]) or strategy == (
                "group_by_length"
            )
            seen.add(tuple(steps))
        assert len(seen) == 1


def test_batch_plan_depends_on_epoch_and_seed() -> None:
    lengths = [7] * 40
    one = order_of(lengths)
    assert one.steps(0) == order_of(lengths).steps(0)
    assert one.steps(0) != one.steps(1)
    assert one.steps(0) != order_of(lengths, seed=2).steps(0)
    in_turn = order_of(lengths, strategy="sequential")
    assert [i for step in in_turn.steps(1) for i in step] == list(range(40))


def test_accumulation_short_examples_need_fewer_micro_batches() -> None:
    lengths = [100] + [10, 20, 30] * 21
    order = order_of(lengths, global_batch=64, ranks=2, max_accumulation=16, max_tokens=200,
                     epochs=1)  # fmt: skip
    assert order.accumulation == 4  # 1,360 tokens in 8 × 200, where 32 × 2 examples were planned
    loads = [sum(lengths[i] for i in group) for group in order.micro_batches(0)]
    assert max(loads) - min(loads) <= 10


def test_batch_plan_group_by_length_pads_less_in_random_order() -> None:
    lengths = [5 + 7 * i % 90 for i in range(400)]

    def spread(strategy: str) -> float:
        steps = order_of(lengths, strategy=strategy).steps(0)
        widths = [max(lengths[i] for i in s) - min(lengths[i] for i in s) for s in steps]
        return sum(widths) / len(widths)

    assert spread("group_by_length") < 0.2 * spread("random")
    means = [sum(map(lengths.__getitem__, s)) for s in order_of(
        lengths, strategy="group_by_length").steps(0)]  # fmt: skip
    assert means != sorted(means, reverse=True)


def test_micro_batch_dataset_empty_micro_batch_has_no_labels() -> None:
    rows = examples((9, 3, 14))
    split = PreparedSplit(datasets.Dataset.from_list(rows), [])
    assert split.lengths == [9, 3, 14]
    micro_batches = MicroBatchDataset(split)
    assert [row["input_ids"] for row in micro_batches[2, 0]] == [
        rows[i]["input_ids"] for i in (2, 0)
    ]
    (blank,) = micro_batches[()]
    assert blank["input_ids"] == rows[1]["input_ids"]
    assert set(blank["labels"]) == {IGNORE_INDEX}
    model = model_of("llama")
    model.set_attn_implementation(packing.register_attention())
    batches = [packing.pack(rows), packing.pack([blank])]
    alone, gradients = losses_and_gradients(model, batches[:1])
    beside, found = losses_and_gradients(model, batches)
    assert beside == pytest.approx(alone, rel=1e-7)
    assert max_difference(found, gradients) < 1e-6


# ---------------------------------------------------------------- the Trainer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_folder(tmp_path_factory.mktemp("llama"))


def trainer_of(base: Path, folder: Path, train: dict[str, Any]) -> Any:
    """Makes the Trainer of a run over texts of very different lengths."""
    made = recipe(
        model={"path": str(base)},
        task=TASK | {"max_length": 64},
        train={"global_batch_size": 8, "train_sampling_strategy": "group_by_length",
               "num_train_epochs": 1, "learning_rate": 1e-2, "logging_steps": 1,
               "eval_strategy": "no", "gradient_checkpointing": False} | train,
        resources={"nodes": 1, "gpus_per_node": 1, "zero_stage": 0},
    )  # fmt: skip
    site = Cluster(name="here", scheduler="local", accelerator="cpu", cores_per_node=2,
                   host_memory_gib=64)  # fmt: skip
    facts = model_facts.compute_model_facts(made.model, made.task, made.method)
    plan = builders.plan_of(made, site, facts)
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = [{"prompt": "say: ", "completion": "ha" * (1 + 7 * i % 26)} for i in range(20)]
    rows = [made.task.training_features(text, tokenizer)[0] for text in texts]
    split = PreparedSplit(datasets.Dataset.from_list(rows), texts)
    context = builders.worker_context(
        folder, made, plan, profile=site, rank=RankInfo(1, 2, 0, "here", "1")
    )
    order = plan_batches(made, plan, split.lengths)
    arguments = finetune.training_arguments(context, order.accumulation, has_validation=False)
    model = load_model(context, tokenizer)
    trainer = finetune.make_trainer(context, arguments, model, tokenizer, split, None)
    trainer.batch_plan, trainer.max_length = order, 64
    return trainer


def test_train_loss_is_the_same_packed_padded_and_accumulated(base: Path, tmp_path: Path) -> None:
    """The run takes two whole steps and one of four examples."""
    losses, accumulated = [], []
    for packs, micro_batch in itertools.product((False, True), (8, 2)):
        train = {"packing": packs, "per_device_train_batch_size": micro_batch}
        trainer = trainer_of(base, tmp_path, train)
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
        accumulated.append(trainer.batch_plan.accumulation)
    assert accumulated == [1, 4, 1, 3]
    assert all(len(each) == 3 for each in losses)
    assert all(each == pytest.approx(losses[0], rel=1e-4) for each in losses)
    assert losses[0][2] < losses[0][0]


def test_evaluation_keeps_the_order_of_examples(base: Path, tmp_path: Path) -> None:
    """Metrics know examples by their place; the Trainer would sort them by length."""
    trainer = trainer_of(base, tmp_path, {"per_device_train_batch_size": 8})
    split = trainer.train_dataset.split
    scored = trainer.get_eval_dataloader(split)
    found = [int(row.sum()) for batch in scored for row in batch["attention_mask"]]
    assert found == split.lengths


def test_train_loss_is_the_same_when_a_row_is_split(base: Path, tmp_path: Path) -> None:
    """A row is split after a step ran out of memory; the step is the same."""
    losses = []
    for piece in (None, 1):
        trainer = trainer_of(base, tmp_path, {"per_device_train_batch_size": 8})
        trainer._piece = piece
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
