"""Tests that training agrees with plain PyTorch: gradients over ranks, and steps of QLoRA.

Each compares a real run of hpcft with a plain loop in this file, in fp32, on the same weights and
examples. Examples have few or many labels, so that a mean of means differs from the mean.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import starts
from builders import Cli, llama_folder, write_rows
from hpcft.config.recipe_types import FullRecipe
from hpcft.core.files import read_record
from hpcft.core.paths import RunPaths
from hpcft.core.records import Plan
from hpcft.training.data import batch_order
from real_runs import losses

pytestmark = pytest.mark.process

FEW, MANY = 2, 30  # labels of an example, without the end of text
# Number of labels of the examples, the longest example first. Two ranks with two packed
# micro-batches each then get examples 0 7 2 5 and 1 6 3 4.
LABELS = [FEW, MANY, FEW, MANY, MANY, FEW, MANY, FEW]

RECIPE = """\
name: agrees
model: { path: base }
task:
  name: instruction
  data: { files: { train: d.jsonl, test: t.jsonl } }
  prompt: "{q}"
  completion: "{a}"
  max_length: 64
method: { name: full }
train:
  global_batch_size: 8
  per_device_train_batch_size: 2
  max_steps: 1
  logging_steps: 1
  train_sampling_strategy: sequential
  lr_scheduler_type: constant
  bf16: false
resources: { nodes: 1, gpus_per_node: 2, zero_stage: 3, time_min: 10 }
"""


def rows(count: int) -> list[dict[str, str]]:
    """Makes examples of up to 60 characters, which are as many tokens."""
    examples = []
    for number in range(count):
        labels = LABELS[number % 8]
        text = f"{number} is not {number + 1}; " * 9
        length = 60 - 4 * (number % 8)
        examples.append({"q": text[: length - labels], "a": text[length - labels : length]})
    return examples


def tokenize(examples: Sequence[dict[str, str]]) -> list[tuple[list[int], int]]:
    """Returns each example's tokens with the end of text, and where its completion starts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("base")
    return [
        ([*tokenizer(row["q"] + row["a"]).input_ids, tokenizer.eos_token_id],
         len(tokenizer(row["q"]).input_ids))
        for row in examples
    ]  # fmt: skip


@pytest.fixture
def agrees(workplace: Path) -> Path:
    """A recipe with its tiny model and data in the same folder."""
    llama_folder(workplace / "base")
    write_rows(workplace / "d.jsonl", rows(24))
    write_rows(workplace / "t.jsonl", rows(2))
    path = workplace / "agrees.yaml"
    path.write_text(RECIPE)
    return path


# ---------------------------------------------------------------- ZeRO-3


RANK = """
import os, sys
import deepspeed
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import save_file
from hpcft.training import worker

original_step = deepspeed.DeepSpeedEngine.step

def step(engine):
    named = engine.module.named_parameters()
    gradients = {name: safe_get_full_grad(parameter).clone() for name, parameter in named}
    if engine.global_rank == 0:
        save_file(gradients, sys.argv[1] + "/gradients.safetensors")
    original_step(engine)

deepspeed.DeepSpeedEngine.step = step
devnull = str(os.open(os.devnull, os.O_WRONLY))  # There is no supervisor to read the pipes.
worker.main(sys.argv[1], "0", str(os.getppid()), devnull, devnull)
"""


def run_ranks(folder: Path, ranks: int) -> None:
    """Starts the ranks of a run as their supervisors do; rank 0 writes the gradients."""
    job = {"EXECUTOR": "local", "LOCAL_JOB_ID": "1", "LOCAL_NTASKS": ranks, "LOCAL_NODEID": 0,
           "LOCAL_JOB_NUM_NODES": 1}  # fmt: skip
    processes = []
    for rank in range(ranks):
        submitit = {**job, "LOCAL_GLOBALID": rank, "LOCAL_LOCALID": rank}
        variables = {f"SUBMITIT_{name}": str(value) for name, value in submitit.items()}
        environment = {**os.environ, **variables, "DS_ACCELERATOR": "cpu",
                       "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
        processes.append(
            subprocess.Popen([sys.executable, "-c", RANK, str(folder)], env=environment, text=True,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        )  # fmt: skip
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, errors


def gradients_of_means(groups: Sequence[Sequence[tuple[list[int], int]]]) -> dict[str, Any]:
    """Computes the gradients of the mean, over groups, of the mean loss over a group's labels."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    for group in groups:
        labels = sum(len(ids) - start for ids, start in group)
        for ids, start in group:
            logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
            targets = torch.tensor(ids[start:])
            loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
            (loss / labels / len(groups)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def distance(actual: dict[str, Any], expected: dict[str, Any]) -> float:
    """Returns the largest relative difference between the gradients of a parameter."""
    assert actual.keys() == expected.keys()
    return max(
        float(torch.norm(actual[name] - expected[name]) / torch.norm(expected[name]))
        for name in expected
    )


def test_zero3_two_ranks_gradients_match_single_process(agrees: Path) -> None:
    """Two ranks with two micro-batches each, to 1e-5 of each gradient's norm in fp32."""
    write_rows(agrees.parent / "d.jsonl", rows(8))
    folder = starts.make_run(agrees.parent / "runs/agrees/1", agrees)
    paths = RunPaths(folder)
    run_ranks(folder, 2)
    gradients = load_file(folder / "gradients.safetensors")

    examples = tokenize(rows(8))
    batch_plan = batch_order.plan_batches(
        read_record(paths.recipe, FullRecipe),
        read_record(paths.plan, Plan),
        [len(ids) for ids, _ in examples],
    )
    batches = list(batch_plan.micro_batches(0))
    assert len(batches) == 4
    ranks = [[examples[i] for batch in batches[rank::2] for i in batch] for rank in range(2)]
    counts = [sum(len(ids) - start for ids, start in rank) for rank in ranks]
    assert max(counts) > 2 * min(counts)
    assert distance(gradients, gradients_of_means([examples])) < 1e-5
    assert distance(gradients, gradients_of_means(ranks)) > 0.1, "a wrong mean would be seen"


# ---------------------------------------------------------------- QLoRA


STEPS = 6
BATCH = 4
RATE = 5e-3


def plain_qlora(examples: list[tuple[list[int], int]]) -> tuple[list[float], dict[str, Any]]:
    """Trains QLoRA as the libraries' manuals do, in padded batches; returns losses and adapter."""
    from peft import (
        LoraConfig,
        get_peft_model,
        get_peft_model_state_dict,
        prepare_model_for_kbit_training,
    )
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, set_seed

    set_seed(7)
    model = AutoModelForCausalLM.from_pretrained(
        "base",
        dtype=torch.float32,
        device_map={"": "cpu"},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        batch = examples[step * BATCH :][:BATCH]
        shape = (BATCH, max(len(ids) for ids, _ in batch))
        ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, -100)
        for row, (tokens, start) in enumerate(batch):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
            labels[row, start : len(tokens)] = torch.tensor(tokens[start:])
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, get_peft_model_state_dict(model)


def test_qlora_losses_and_adapter_match_plain_loop(agrees: Path, cli: Cli) -> None:
    """Six steps in fp32, in two packed micro-batches each: losses to 1e-5, weights to 1e-4."""
    method = "{name: qlora, r: 4, lora_alpha: 8, target_modules: all-linear}"
    change = [f"method={method}", "resources={gpus_per_node: 1, zero_stage: 0}",
              f"train={{global_batch_size: {BATCH}, max_steps: {STEPS}, learning_rate: {RATE}, "
              "seed: 7}"]  # fmt: skip
    options = [word for text in change for word in ("-o", text)]
    done = cli("submit", agrees, "-c", "local", *options, "--watch")
    assert done.code == 0, done.err
    (folder,) = (agrees.parent / "runs/agrees").glob("*")
    paths = RunPaths(folder)
    plain_losses, adapter = plain_qlora(tokenize(rows(24)))
    assert len(plain_losses) == STEPS
    assert losses(folder) == pytest.approx(plain_losses, abs=1e-5)
    assert abs(plain_losses[-1] - plain_losses[0]) > 0.1, "training changes the loss"
    saved = load_file(paths.model / "adapter_model.safetensors")
    assert saved.keys() == adapter.keys()
    for name, tensor in adapter.items():
        assert torch.norm(saved[name] - tensor) <= 1e-4 * torch.norm(tensor), name
