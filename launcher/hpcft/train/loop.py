"""From a prepared run to its result: arguments, Trainer, scoring, weights, record."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import time
from typing import Any

import torch
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    TrainerCallback,
    TrainingArguments,
)

from hpcft import ladder, rates, speed
from hpcft.memory.states import COMMUNICATOR, tensor_bytes
from hpcft.methods.features import Features
from hpcft.paths import RunPaths
from hpcft.recipe import FullRecipe
from hpcft.records import Cluster, Measured, Plan, Prediction, RunRecord
from hpcft.rungs import taken
from hpcft.store import read, write
from hpcft.tasks.base import IGNORED, LOWER_IS_BETTER
from hpcft.tasks.chunked_loss import loss_of
from hpcft.train import checkpoints, operators, prepare, start
from hpcft.train import model as models
from hpcft.train.features import FeatureTrainer
from hpcft.train.heartbeat import Heartbeat
from hpcft.train.peaks import most_bytes, of_all_ranks
from hpcft.train.prepare import Split
from hpcft.train.scoring import ScoringTrainer
from hpcft.train.start import Rank
from hpcft.train.stepping import stepper

VERSIONS = ("hpcft", "torch", "transformers", "deepspeed", "peft", "bitsandbytes", "accelerate")


class ScoreBefore(TrainerCallback):  # type: ignore[misc]
    """Scores the model before its first step.

    It does so once training has set up DeepSpeed's engine: an engine made for scoring alone needs
    ZeRO-3, and cannot train afterwards.
    """

    def __init__(self, trainer: ScoringTrainer, split: Split, heartbeat: Heartbeat) -> None:
        self.trainer = trainer
        self.split = split
        self.heartbeat = heartbeat
        self.metrics: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The engine is there, and no step is done unless it goes on from a checkpoint."""
        if state.global_step:
            self.metrics = self.heartbeat.logged("before")
            return
        self.metrics = _score(self.trainer, self.split, self.heartbeat, "before")


def run(
    paths: RunPaths,
    recipe: FullRecipe,
    cluster: Cluster,
    plan: Plan,
    heartbeat: Heartbeat,
    generation: int,
) -> None:
    """Trains and scores; rank 0 writes the record.

    Args:
        paths: the run.
        recipe: its recipe.
        cluster: its profile.
        plan: what runs now: the submitted plan, or one lowered by the ladder.
        heartbeat: of this rank.
        generation: how many rungs had been taken when this process was started.
    """
    me = heartbeat.me
    if generation:  # from here on, metrics.jsonl begins anew or goes on from a checkpoint
        rung = taken(paths)[-1]
        heartbeat.log("rung", {"number": rung.number, "change": rung.change, "how": rung.how})
    heartbeat.set(phase="data")
    if me.is_first:
        prepare.prepare(paths, recipe)
        operators.build(plan)
    start.meet(paths, cluster, me, generation)
    summary = prepare.summary(paths)
    tokenizer = prepare.load_tokenizer(paths)
    train = prepare.load_split(paths, "train")
    validation = prepare.load_split(paths, "validation")
    scored = prepare.load_split(paths, recipe.evaluation.split)
    assert train is not None
    assert scored is not None

    heartbeat.set(phase="model")
    arguments = training_arguments(paths, recipe, plan, has_validation=validation is not None)
    _start_communication(plan)
    model = models.load(paths, recipe, plan, tokenizer)
    parameters = models.counted(model, plan.facts)
    trainer = _trainer(recipe, plan, arguments, model, tokenizer, train, validation, heartbeat)
    heartbeat.tokens_per_step = (
        summary.tokens["train"] / len(train) * recipe.train.global_batch_size
    )

    before = ScoreBefore(trainer, scored, heartbeat)
    if recipe.evaluation.before:
        trainer.add_callback(before)
    trainer.step_down = stepper(paths, recipe, cluster, plan, heartbeat)
    # Sharded otherwise, a checkpoint cannot be loaded: then the run begins anew.
    goes_on = generation > 0 and ladder.shards_alike(read(paths.plan, Plan).layout, plan.layout)
    checkpoint = checkpoints.latest(paths, me.world_size) if goes_on else None
    train_started = time.time()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    train_s = time.time() - train_started
    after = _score(trainer, scored, heartbeat, recipe.evaluation.split)

    heartbeat.set(phase="saving")
    _save(trainer, tokenizer, paths, me)
    heartbeat.peaks.end("saving")
    found = _gathered((me.node, heartbeat.peaks.phases))
    if me.is_first:
        phases = of_all_ranks(found, plan.other_processes_bytes)
        wall_s = time.time() - heartbeat.progress.started_at
        write(
            paths.result,
            RunRecord(
                run_id=paths.folder.name,
                recipe=recipe.name,
                cluster=cluster.name,
                finished_at=time.time(),
                job_id=me.job_id,
                split=recipe.evaluation.split,
                metrics=after,
                metrics_before=before.metrics,
                examples=summary.examples,
                notes=summary.notes + plan.warnings,
                parameters=parameters,
                predicted_memory_bytes=plan.gpu_peak_bytes,
                predicted=_predicted(recipe, cluster, plan),
                measured=Measured(
                    wall_s=wall_s,
                    train_s=train_s,
                    gpu_hours=wall_s * me.world_size / 3600,
                    peak_memory_bytes=most_bytes(list(phases.values())),
                    peak_host_bytes=max(peaks.host_bytes for peaks in phases.values()),
                    tokens_per_s=heartbeat.progress.tokens_per_s,
                    phases=phases,
                    step_s=heartbeat.times.median_s,
                    timed_steps=heartbeat.times.count,
                    tokens_per_step=heartbeat.tokens_per_step,
                ),
                rungs=taken(paths),
                versions={name: importlib.metadata.version(name) for name in VERSIONS},
            ),
        )
    heartbeat.set(phase="done")


def _predicted(recipe: FullRecipe, cluster: Cluster, plan: Plan) -> Prediction | None:
    """What the plan says of what is measured; a lowered plan still says what it did before."""
    if plan.time is None:
        return None
    step = plan.time.step
    return Prediction(
        tensor_bytes=tensor_bytes(plan),
        communicator_bytes=sum(i.bytes for i in plan.gpu_memory if i.name == COMMUNICATOR),
        step_s=step.total_s,
        flops_s=step.compute_s - speed.overhead_s(plan.facts, plan.layout),
        efficiency=rates.efficiency(cluster),
        tokens_per_step=recipe.train.global_batch_size * recipe.task.max_length,
    )


def training_arguments(
    paths: RunPaths, recipe: FullRecipe, plan: Plan, *, has_validation: bool
) -> TrainingArguments:
    """The recipe's fields, which bear the same names, and the plan's layout."""
    same = recipe.train.model_dump(
        exclude={"global_batch_size", "per_device_train_batch_size", "bf16", "fp16",
                 "gradient_checkpointing", "optim", "eval_strategy",
                 "label_smoothing_factor"}
    )  # fmt: skip
    layout = plan.layout
    on_cpu = plan.accelerator == "cpu"
    return TrainingArguments(
        output_dir=str(paths.checkpoints),
        per_device_train_batch_size=layout.per_device_train_batch_size,
        gradient_accumulation_steps=layout.gradient_accumulation_steps,
        gradient_checkpointing=layout.gradient_checkpointing,
        per_device_eval_batch_size=plan.per_device_eval_batch_size,
        eval_strategy=recipe.train.eval_strategy if has_validation else "no",
        optim=plan.optim,
        # The Trainer guesses the direction from the name, and takes perplexity for a score.
        greater_is_better=(recipe.train.metric_for_best_model or "loss") not in LOWER_IS_BETTER,
        bf16=plan.precision == "bf16",
        fp16=plan.precision == "fp16",
        deepspeed=plan.ds_config,
        use_cpu=on_cpu,
        ddp_backend=None if start.is_alone(plan) else "gloo" if on_cpu else "nccl",
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=not on_cpu,
        data_seed=recipe.train.seed,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],
        disable_tqdm=True,
        log_level="warning",
        **same,
    )


def _start_communication(plan: Plan) -> None:
    """DeepSpeed's communication, which `from_pretrained` needs under ZeRO-3.

    Accelerate leaves it out on a CPU, and the model would be built before there are ranks.
    """
    if plan.ds_config is not None:
        import deepspeed

        deepspeed.init_distributed(
            dist_backend="gloo" if plan.accelerator == "cpu" else "nccl", verbose=False
        )


def _trainer(
    recipe: FullRecipe,
    plan: Plan,
    arguments: TrainingArguments,
    model: Any,
    tokenizer: Any,
    train: Split,
    validation: Split | None,
    heartbeat: Heartbeat,
) -> ScoringTrainer:
    collator = (
        DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
        if recipe.task.labels_per_token
        else DataCollatorWithPadding(tokenizer)
    )
    smoothing = recipe.train.label_smoothing_factor
    common = {
        "model": model,
        "args": arguments,
        "train_dataset": train,
        "eval_dataset": validation,
        "data_collator": collator,
        "processing_class": tokenizer,
        "callbacks": [heartbeat],
    }
    if isinstance(recipe.method, Features):
        return FeatureTrainer(recipe.method, recipe.task, **common)
    loss = loss_of(recipe.task, model, plan.layout.loss_chunks)
    trainer: ScoringTrainer = ScoringTrainer(
        **common,
        compute_loss_func=lambda outputs, labels, num_items_in_batch=None: loss(
            outputs, labels, num_items_in_batch, smoothing
        ),
        compute_metrics=lambda p: recipe.task.metrics(
            p.predictions, p.label_ids, trainer.scored.examples
        ),
        preprocess_logits_for_metrics=loss.reduce_logits,
    )
    return trainer


def _score(
    trainer: ScoringTrainer, split: Split, heartbeat: Heartbeat, name: str
) -> dict[str, float]:
    heartbeat.set(phase="evaluation")
    raw = trainer.evaluate(split, metric_key_prefix="score")
    own = {key.removeprefix("score_"): float(value) for key, value in raw.items()}
    # The Trainer's own figures (loss over padded batches, speed) are not metrics of the task.
    timing = ("runtime", "samples_per_second", "steps_per_second", "loss", "epoch",
              "model_preparation_time", "num_input_tokens_seen")  # fmt: skip
    metrics = {key: value for key, value in own.items() if key not in timing}
    heartbeat.log(name, metrics)
    return metrics


def _save(trainer: ScoringTrainer, tokenizer: Any, paths: RunPaths, me: Rank) -> None:
    """Final weights as safetensors (of an adapter: the adapter), written aside and then named."""
    aside = paths.folder / "model.part"
    trainer.save_model(str(aside))
    if me.is_first:
        tokenizer.save_pretrained(aside)
        (aside / "training_args.bin").unlink(missing_ok=True)  # a pickle; the recipe says it all
        shutil.rmtree(paths.model, ignore_errors=True)  # of an earlier attempt
        os.replace(aside, paths.model)


def _gathered(value: Any) -> list[Any]:
    """The value of every rank, on every rank."""
    if not torch.distributed.is_initialized():
        return [value]
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, value)
    return every
