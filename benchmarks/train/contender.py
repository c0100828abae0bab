"""Trains with one contender in this process: `contender.py NAME FOLDER RESULT STEPS`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from meter import Meter, Watch
from skewed_data import GLOBAL_BATCH, MAX_LENGTH, MICRO_BATCH

ACCUMULATION = GLOBAL_BATCH // MICRO_BATCH
LEARNING_RATE = 1e-4


def common(folder: Path, steps: int) -> dict[str, Any]:
    """Returns the arguments that all Trainers share."""
    return {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": MICRO_BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_steps": steps,
        "learning_rate": LEARNING_RATE,
        "optim": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }


def train_padded(folder: Path, watch: Watch, steps: int) -> None:
    """Trains as the example scripts of transformers do, with rows padded to the maximum."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = datasets.load_dataset("json", data_files=str(folder / "train.jsonl"), split="train")

    def features(row: dict[str, str]) -> dict[str, Any]:
        prompt = len(tokenizer(row["prompt"])["input_ids"])
        text = row["prompt"] + row["completion"] + tokenizer.eos_token
        text = text.replace(tokenizer.eos_token, " " + tokenizer.eos_token)
        encoded = tokenizer(text, padding="max_length", max_length=MAX_LENGTH, truncation=True)
        labels = [
            token if place >= prompt and real else -100
            for place, (token, real) in enumerate(
                zip(encoded["input_ids"], encoded["attention_mask"], strict=True)
            )
        ]
        return {**encoded, "labels": labels}

    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        args=TrainingArguments(**common(folder, steps)),
        train_dataset=rows.map(features, remove_columns=rows.column_names),
        callbacks=[watch],
    )
    trainer.train()


def train_trl(folder: Path, watch: Watch, steps: int, **options: Any) -> None:
    """Trains with TRL's SFTTrainer and its defaults, except for precision and recomputation."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    rows = datasets.load_dataset("json", data_files=str(folder / "train.jsonl"), split="train")
    trainer = SFTTrainer(
        model=str(folder / "model"),
        args=SFTConfig(
            **common(folder, steps) | options,
            max_length=MAX_LENGTH,
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=rows,
        callbacks=[watch],
    )
    trainer.train()


def train_factory(folder: Path, watch: Watch, steps: int, **options: Any) -> None:
    """Trains with LLaMA-Factory's supervised fine-tuning, and its template that adds no text."""
    from llamafactory.train.tuner import run_exp

    run_exp(
        {
            **common(folder, steps),
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "full",
            "model_name_or_path": str(folder / "model"),
            "dataset_dir": str(folder),
            "dataset": "skewed",
            "template": "empty",
            "cutoff_len": MAX_LENGTH,
            "flash_attn": "sdpa",
            "disable_gradient_checkpointing": True,
            "overwrite_output_dir": True,
            **options,
        },
        callbacks=[watch],
    )


def train_bare(folder: Path, result: Path, steps: int) -> None:
    """Trains with a plain PyTorch loop over the micro-batches of hpcft's run in `folder/runs`."""
    import torch
    from transformers import AutoModelForCausalLM

    from hpcft.config.recipe_types import FullRecipe
    from hpcft.core.files import read_record
    from hpcft.core.paths import RunPaths
    from hpcft.core.records import Plan
    from hpcft.tasks import packing
    from hpcft.training.data import batch_order, prepare

    (plan_file,) = (folder / "runs").glob("*/*/plan.json")
    paths = RunPaths(plan_file.parent)
    recipe, plan = read_record(paths.recipe, FullRecipe), read_record(paths.plan, Plan)
    split = prepare.load_split(paths, "train")
    assert split is not None
    batch_plan = batch_order.plan_batches(recipe, plan, split.lengths)
    dataset = batch_order.MicroBatchDataset(split)
    micro_batches = batch_plan.micro_batches(0)
    attention = packing.register_attention()
    model = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation=attention)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    meter = Meter()
    for _ in range(steps):
        batches = [
            packing.pack(dataset[next(micro_batches)]) for _ in range(batch_plan.accumulation)
        ]
        items = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        for batch in batches:
            meter.count_batch(batch)
            labels = batch.pop("labels")
            logits = model(**batch, use_cache=False).logits
            targets = labels[:, 1:]
            counted = targets != -100
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1][counted], targets[counted], reduction="sum"
            )
            (loss / items).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        meter.end_step()
    result.write_text(json.dumps(meter.result()))


def train_hpcft(folder: Path, watch: Watch) -> None:
    """Trains as a rank of hpcft, started as its supervisor does, with the meter as a callback."""
    from transformers import trainer_callback

    from hpcft.training import worker

    (plan_file,) = (folder / "runs").glob("*/*/plan.json")
    original = trainer_callback.CallbackHandler.__init__

    def with_meter(handler: Any, callbacks: Any, *more: Any, **named: Any) -> None:
        original(handler, [*callbacks, watch], *more, **named)

    trainer_callback.CallbackHandler.__init__ = with_meter
    # There is no supervisor to read heartbeats and stacks.
    pipe, stacks = os.open(os.devnull, os.O_WRONLY), os.memfd_create("stacks")
    worker.main(str(plan_file.parent), "0", *map(str, (os.getppid(), pipe, stacks)))


def main(name: str, folder: Path, result: Path, steps: int) -> None:
    """Trains with the contender of that name."""
    if name == "bare":
        return train_bare(folder, result, steps)
    watch = Watch(result)
    # These give as many tokens a step as the others have: a packed row holds several examples.
    rows = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
    contenders: dict[str, Any] = {
        "ours": lambda: train_hpcft(folder, watch),
        "padded": lambda: train_padded(folder, watch, steps),
        "trl": lambda: train_trl(folder, watch, steps),
        "trl-packed": lambda: train_trl(folder, watch, steps, packing=True, **rows),
        "factory": lambda: train_factory(folder, watch, steps),
        "factory-packed": lambda: train_factory(folder, watch, steps, neat_packing=True, **rows),
    }
    return contenders[name]()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
