"""Checks that the Trainer takes the same steps packed, padded, accumulated and split."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoTokenizer

import builders
from hpcft.core.records import Cluster
from hpcft.planning import model_facts
from hpcft.training.data.batch_order import plan_batches
from hpcft.training.data.prepare import PreparedSplit
from hpcft.training.distributed.rank_env import RankInfo
from hpcft.training.modes import finetune
from hpcft.training.trainer.model import load_model

pytestmark = pytest.mark.process

TASK = {"name": "instruction", "prompt": "{q}", "completion": "{a}", "max_length": 64,
        "data": {"files": {"train": "a.jsonl", "test": "b.jsonl"}}}  # fmt: skip


def trainer_of(base: Path, folder: Path, train: dict[str, Any]) -> Any:
    """Makes the Trainer of a run over texts of very different lengths."""
    made = builders.recipe(
        model={"path": str(base)},
        task=TASK,
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


def test_validation_loss_of_choices_is_that_of_true_completions_by_tokens(
    base: Path, tmp_path: Path
) -> None:
    """By default it decides which checkpoint is best: wrong choices and batches do not count."""
    choices = ["ha", "never and nowhere"]
    task = {**TASK, "choices": choices}
    texts = [{"prompt": "say: " * (1 + i % 4), "completion": choices[i % 3 == 0]}
             for i in range(9)]  # fmt: skip
    made = builders.recipe(
        model={"path": str(base)}, task=task, train={"load_best_model_at_end": True},
        resources={"nodes": 1, "gpus_per_node": 1, "zero_stage": 0},
    )  # fmt: skip
    site = Cluster(name="here", scheduler="local", accelerator="cpu", cores_per_node=2,
                   host_memory_gib=64)  # fmt: skip
    facts = model_facts.compute_model_facts(made.model, made.task, made.method)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [row for text in texts for row in made.task.scoring_features(text, tokenizer)]
    split = PreparedSplit(datasets.Dataset.from_list(rows), texts)
    found = []
    for batch in (1, 5):
        plan = builders.plan_of(made, site, facts)
        plan = plan.model_copy(update={"per_device_eval_batch_size": batch})
        context = builders.worker_context(tmp_path, made, plan, profile=site)
        arguments = finetune.training_arguments(context, 1, has_validation=False)
        arguments.metric_for_best_model = arguments.metric_for_best_model or "loss"
        model = load_model(context, tokenizer).eval()
        trainer = finetune.make_trainer(context, arguments, model, tokenizer, None, split)
        values = trainer.evaluate(split)
        assert values["eval_loss"] == values["eval_completion_loss"]
        trainer._determine_best_metric(values, None)
        assert trainer.state.best_metric == values["eval_loss"]
        found.append(values["eval_loss"])
    total = tokens = 0.0
    for text in texts:
        prompt = tokenizer(text["prompt"])["input_ids"]
        ids = torch.tensor([tokenizer(text["prompt"] + text["completion"])["input_ids"]])
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0].log_softmax(-1)
        for place in range(len(prompt), ids.shape[1]):
            total -= float(logs[place - 1, ids[0, place]])
            tokens += 1
    assert found == pytest.approx([total / tokens] * 2, rel=1e-5)
