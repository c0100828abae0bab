"""Fine-tuning mode: builds the Trainer, trains, scores, and saves the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.records import Plan
from hpcft.metrics import lower_is_better
from hpcft.metrics.base import Scores
from hpcft.planning import disk
from hpcft.planning.inputs import PlanInputs
from hpcft.planning.run_time import SHARED_DISK_BYTES_S
from hpcft.tasks import packing, padding
from hpcft.tasks.chunked_loss import make_loss
from hpcft.training.checkpointing import node_local, reshard
from hpcft.training.context import WorkerContext
from hpcft.training.data import batch_order, prepare
from hpcft.training.data.batch_order import MicroBatchDataset
from hpcft.training.data.prepare import PreparedSplit
from hpcft.training.distributed import rank_env, stop_signal
from hpcft.training.distributed.collectives import RankConsensus, gather_objects
from hpcft.training.modes.result import ModeResult
from hpcft.training.modes.saved_model import save_model
from hpcft.training.telemetry.progress import ProgressReporter
from hpcft.training.trainer.checkpointing import CheckpointState
from hpcft.training.trainer.features import FeatureTrainer
from hpcft.training.trainer.model import check_parameter_count, load_model
from hpcft.training.trainer.nan_guard import NanGuard
from hpcft.training.trainer.oom_retry import make_fallback_hook
from hpcft.training.trainer.save_callback import SaveCallback
from hpcft.training.trainer.trainer import ScoringTrainer


class ScoreBefore(TrainerCallback):  # type: ignore[misc]
    """Scores the model before its first step.

    It scores after training has set up DeepSpeed's engine: an engine for scoring only needs ZeRO-3,
    and cannot train afterwards.
    """

    def __init__(
        self, trainer: ScoringTrainer, split: PreparedSplit, reporter: ProgressReporter
    ) -> None:
        self.trainer = trainer
        self.split = split
        self.reporter = reporter
        self.metrics: Scores = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Scores the model, unless the run resumes from a checkpoint: then it was scored before."""
        if state.global_step:
            self.metrics = self.reporter.last_logged("before")
            return
        self.metrics = score_split(self.trainer, self.split, self.reporter, "before")


def finetune(context: WorkerContext) -> ModeResult:
    """Trains the model and scores it."""
    recipe, plan, reporter = context.recipe, context.plan, context.reporter
    paths, rank = context.paths, context.rank
    # Only rank 0 looks for checkpoints, because the shared folder of another rank may lag behind.
    resume = reshard.find_resume_checkpoint(paths, plan) if rank.is_first else (None, [])
    summary = prepare.prepare_all_ranks(context)
    tokenizer = prepare.load_tokenizer(paths)
    train = prepare.load_split(paths, "train")
    validation = prepare.load_split(paths, "validation")
    scored = prepare.load_split(paths, recipe.evaluation.split)
    assert train is not None
    assert scored is not None

    reporter.set(phase="model")
    batches = batch_order.plan_batches(recipe, plan, train.lengths)
    rank_env.init_process_group(plan)
    checkpoint, skipped = gather_objects(resume)[0]
    resumed = checkpoint.record if checkpoint else None
    universal = bool(resumed and reshard.needs_conversion(resumed.layout, plan.layout))
    arguments = training_arguments(
        context,
        batches.accumulation,
        has_validation=validation is not None,
        universal=universal,
    )
    model = load_model(context, tokenizer)
    parameters = check_parameter_count(model, plan.facts)
    trainer = make_trainer(context, arguments, model, tokenizer, train, validation)
    trainer.batch_plan, trainer.max_length = batches, recipe.task.max_length
    reporter.tokens_per_step = summary.tokens["train"] / len(train) * recipe.train.global_batch_size

    before = ScoreBefore(trainer, scored, reporter)
    if recipe.evaluation.before:
        trainer.add_callback(before)
    trainer.add_callback(NanGuard(paths, plan.precision))
    trainer.fallback_hook = make_fallback_hook(context)
    inputs = PlanInputs.of_plan(recipe, context.run.cluster, plan)
    size = disk.checkpoint_bytes(inputs, plan.layout)
    trainer.checkpoint_state = state = CheckpointState(
        paths=paths,
        plan=plan,
        rank=rank,
        consensus=RankConsensus(),
        save_total_limit=recipe.train.save_total_limit,
        checkpoint_bytes=size,
        node_folder=node_local.prepare_node_folder(paths, context.run.cluster, rank),
        resumed_from=resumed,
        notes=[*(resumed.notes if resumed else ()), *skipped],
        saved_step=resumed.step if resumed else 0,
    )
    trainer.add_callback(
        SaveCallback(
            trainer,
            stop_signal.stop_request,
            checkpoint_min=recipe.resources.checkpoint_min,
            expected_save_s=1 + size / SHARED_DISK_BYTES_S,
        )
    )
    trainer.train(resume_from_checkpoint=str(checkpoint.folder) if checkpoint else None)
    train_s = state.train_s
    metrics = score_split(trainer, scored, reporter, recipe.evaluation.split)

    reporter.set(phase="saving")
    result = ModeResult(summary, parameters, metrics, before.metrics, train_s, state.notes)
    save_model(context, trainer, tokenizer, result)
    return result


def training_arguments(
    context: WorkerContext,
    accumulation: int,
    *,
    has_validation: bool,
    universal: bool = False,
) -> TrainingArguments:
    """Builds the Trainer's arguments from the recipe's fields of the same names, and the plan.

    To the Trainer and to DeepSpeed a whole micro-batch is one item of the data.

    Args:
        context: run, plan and rank of this process.
        accumulation: number of micro-batches of a step on each rank.
        has_validation: whether there is a split to score during training.
        universal: whether it resumes from a checkpoint in DeepSpeed's universal format.
    """
    recipe, plan = context.recipe, context.plan
    ds_config = plan.ds_config and {
        **plan.ds_config,
        **_sizes(accumulation, plan.layout.world_size),
        "checkpoint": {"load_universal": universal},
    }
    from_recipe = recipe.train.model_dump(
        exclude={"global_batch_size", "per_device_train_batch_size", "bf16", "fp16",
                 "gradient_checkpointing", "optim", "eval_strategy",
                 "label_smoothing_factor", "packing", "train_sampling_strategy",
                 "save_total_limit"}
    )  # fmt: skip
    layout = plan.layout
    on_cpu = plan.accelerator == "cpu"
    return TrainingArguments(
        output_dir=str(context.paths.checkpoints),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=layout.gradient_checkpointing,
        per_device_eval_batch_size=plan.per_device_eval_batch_size,
        eval_strategy=recipe.train.eval_strategy if has_validation else "no",
        optim=recipe.train.optim,
        # The Trainer would guess this from the metric's name, wrongly for perplexity.
        greater_is_better=not lower_is_better(recipe.train.metric_for_best_model or "loss"),
        bf16=plan.precision == "bf16",
        fp16=plan.precision == "fp16",
        deepspeed=ds_config,
        use_cpu=on_cpu,
        ddp_backend=None if rank_env.single_process(plan) else "gloo" if on_cpu else "nccl",
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=not on_cpu,
        data_seed=recipe.train.seed,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],
        disable_tqdm=True,
        logging_nan_inf_filter=False,  # It would hide a loss of NaN, and wait for the device.
        log_level="warning",
        **from_recipe,
    )


def _sizes(accumulation: int, ranks: int) -> dict[str, int]:
    """Returns the batch sizes in DeepSpeed's configuration."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": accumulation * ranks,
    }


def make_trainer(
    context: WorkerContext,
    arguments: TrainingArguments,
    model: Any,
    tokenizer: Any,
    train: PreparedSplit | None,
    validation: PreparedSplit | None,
) -> ScoringTrainer:
    """Creates the Trainer of a run; without a `train` split it only scores."""
    recipe, plan = context.recipe, context.plan
    smoothing = recipe.train.label_smoothing_factor
    common = {
        "model": model,
        "args": arguments,
        "eval_dataset": validation,
        "data_collator": _collator(recipe, plan, tokenizer),
        "processing_class": tokenizer,
        "callbacks": [context.reporter],
    }
    if recipe.method.extracts_features:
        return FeatureTrainer(
            recipe.method.regression_options(),
            recipe.task.as_trained,
            train_dataset=train,
            **common,
        )
    task = recipe.task.as_trained
    loss = make_loss(task, model, plan.layout.loss_chunks)
    trainer: ScoringTrainer = ScoringTrainer(
        **common,
        train_dataset=MicroBatchDataset(train) if train else None,
        compute_loss_func=lambda outputs, labels, num_items_in_batch=None: loss(
            outputs, labels, num_items_in_batch, smoothing
        ),
        compute_metrics=lambda p: task.validation_scores(
            p.predictions, p.label_ids, trainer.scored.examples
        ),
        preprocess_logits_for_metrics=lambda logits, labels: loss.reduce_logits(
            task.hide_padding(logits, trainer.scored_mask), labels
        ),
    )
    return trainer


def _collator(
    recipe: FullRecipe, plan: Plan, tokenizer: Any
) -> Callable[[list[Any]], dict[str, Any]]:
    """Returns the function that makes a batch: of a micro-batch, or of rows when scoring."""
    pad = padding.make_collator(recipe.task, tokenizer, plan.facts.model_type)
    train = packing.pack if recipe.packs(plan.facts.model_type) else pad
    return lambda items: train(items[0]) if isinstance(items[0], list) else pad(items)


def score_split(
    trainer: ScoringTrainer, split: PreparedSplit, reporter: ProgressReporter, name: str
) -> Scores:
    """Scores a split, and logs its metrics under that name."""
    reporter.set(phase="evaluation")
    raw = trainer.evaluate(split, metric_key_prefix="score")
    values = {key.removeprefix("score_"): value for key, value in raw.items()}
    # The Trainer's own values (loss over padded batches, speed) are not metrics of the task.
    not_metrics = ("runtime", "samples_per_second", "steps_per_second", "loss", "epoch",
              "model_preparation_time", "num_input_tokens_seen")  # fmt: skip
    metrics = {key: value for key, value in values.items() if key not in not_metrics}
    reporter.log(name, metrics)
    return metrics
