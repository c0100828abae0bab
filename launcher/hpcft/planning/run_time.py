"""Predicts how long a run takes, and the time limit to request."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.records import Layout, MemoryItem, RunTime, Split, StepTime
from hpcft.methods.base import COMPUTE_BYTES
from hpcft.planning.disk import checkpoint_bytes, model_bytes
from hpcft.planning.inputs import PlanInputs
from hpcft.planning.step_time import forward_flops

# Importing torch and DeepSpeed from a shared file system, the rendezvous, compiling.
START_S = 120.0
# A shared file system while others use it too.
SHARED_DISK_BYTES_S = 0.5e9
# The limit is the estimate times this: efficiency is a guess until runs have calibrated it, and a
# run that is killed by its limit costs more than one that would have been scheduled earlier.
TIME_MARGIN = 2.0
# Added to the limit, for slow starts with a cold cache.
ALLOWANCE_MIN = 10
ROUNDED_TO_MIN = 5
# Slurm may send its signal a minute before the requested time (sbatch --signal), never after it.
SIGNAL_TOLERANCE_S = 60.0
# Largest share of the time limit that is kept free for the last save.
MAX_SIGNAL_SHARE = 0.25


def predict_run_time(inputs: PlanInputs, layout: Layout, step: StepTime) -> RunTime:
    """Returns the predicted time of a run.

    Args:
        inputs: what is planned.
        layout: how the run is laid out.
        step: the predicted time of one optimizer step, or of one batch that is scored.
    """
    recipe = inputs.recipe
    weights_bytes = COMPUTE_BYTES[inputs.precision] * inputs.facts.parameters.total
    start_s = START_S + weights_bytes / SHARED_DISK_BYTES_S
    if not recipe.method.trains:
        steps = _scoring_batches(inputs, layout)
        return RunTime(step=step, steps=steps, start_s=start_s, evaluation_s=0.0, saving_s=0.0)
    return RunTime(
        step=step,
        steps=total_steps(inputs),
        start_s=start_s,
        evaluation_s=_evaluation_s(inputs, layout),
        saving_s=_saved_bytes(inputs, layout) / SHARED_DISK_BYTES_S,
    )


def _scoring_batches(inputs: PlanInputs, layout: Layout) -> int | None:
    """Returns the batches of a rank that only scores; None where the split's size is unknown."""
    recipe = inputs.recipe
    examples = inputs.examples.get(recipe.evaluation.split)
    if examples is None:
        return None
    rows = recipe.task.rows_per_batch(layout.per_device_train_batch_size)
    return math.ceil(examples * recipe.task.rows_per_example / (rows * layout.world_size))


def total_steps(inputs: PlanInputs) -> int | None:
    """Returns the optimizer steps of the run; None where the number of examples is unknown."""
    train = inputs.recipe.train
    if train.max_steps > 0:
        return train.max_steps
    if "train" not in inputs.examples:
        return None
    steps_per_epoch = math.ceil(inputs.examples["train"] / train.global_batch_size)
    return math.ceil(steps_per_epoch * train.num_train_epochs)


def _evaluation_s(inputs: PlanInputs, layout: Layout) -> float | None:
    """Returns the time of scoring during and after training; None where a size is unknown."""
    recipe, length = inputs.recipe, inputs.scored_tokens(layout)
    sizes = [inputs.examples.get(split) for split in _scored_splits(recipe, total_steps(inputs))]
    if None in sizes:
        return None
    rates = inputs.rates(layout)
    rows = sum(filter(None, sizes)) * recipe.task.rows_per_example
    flops = rows * forward_flops(inputs.facts, length, length)
    return flops / rates.flops / layout.world_size


def _scored_splits(recipe: FullRecipe, steps: int | None) -> list[Split]:
    """Returns the splits that are scored, each as often as it is."""
    final: list[Split] = [recipe.evaluation.split] * (1 + recipe.evaluation.before)
    data = recipe.task.data
    has_validation = "validation" in (data.fractions or data.files or data.splits)
    return final + ["validation"] * (_evaluations(recipe, steps) if has_validation else 0)


def _evaluations(recipe: FullRecipe, steps: int | None) -> int:
    """Returns how often the validation split is scored during training."""
    train = recipe.train
    if train.eval_strategy == "no":
        return 0
    if train.eval_strategy == "steps" and train.eval_steps:
        return (steps or 0) // train.eval_steps
    return math.ceil(train.num_train_epochs)


def _saved_bytes(inputs: PlanInputs, layout: Layout) -> int:
    """Returns the bytes of all checkpoints that the run writes, and of the finished model."""
    saved = model_bytes(inputs, layout)
    if inputs.recipe.train.save_strategy != "no":
        checkpoints = checkpoint_count(inputs.recipe, total_steps(inputs)) or 0
        saved += checkpoints * checkpoint_bytes(inputs, layout)
    return saved


def checkpoint_count(recipe: FullRecipe, steps: int | None) -> int | None:
    """Returns the number of checkpoints that the recipe asks for; None where it is unknown.

    Args:
        recipe: the recipe.
        steps: optimizer steps of the run; None where they are unknown.
    """
    train = recipe.train
    if train.save_strategy == "steps":
        return None if steps is None else max(1, steps // train.save_steps)
    return math.ceil(train.num_train_epochs) if train.save_strategy == "epoch" else 0


def time_limit_min(inputs: PlanInputs, time: RunTime) -> int:
    """Returns the time limit to request: the recipe's, or one from the estimate, in minutes.

    Where the estimate is not complete, or nobody waits for the end (a local run), it is the longest
    that the profile allows.
    """
    requested, longest = inputs.recipe.resources.time_min, inputs.cluster.time_limit_min
    if requested != "auto":
        return requested
    if time.run_s is None or inputs.cluster.scheduler == "local":
        return longest
    needed = TIME_MARGIN * time.run_s / 60 + ALLOWANCE_MIN
    return min(ROUNDED_TO_MIN * math.ceil(needed / ROUNDED_TO_MIN), longest)


def over_limit_s(inputs: PlanInputs, time: RunTime) -> float:
    """Returns by how many seconds a run exceeds the longest time limit that it may request."""
    requested = inputs.recipe.resources.time_min
    limit_s = 60 * (inputs.cluster.time_limit_min if requested == "auto" else requested)
    return max(0.0, (time.run_s or 0.0) - limit_s)


def signal_delay_s(time: RunTime, disk: Sequence[MemoryItem], limit_min: int) -> int:
    """Returns how long before its time limit a job is signalled: time for two steps and a save.

    Args:
        time: the predicted time of the run.
        disk: what the run writes, by component.
        limit_min: the job's time limit in minutes.
    """
    writing_s = sum(item.bytes for item in disk) / SHARED_DISK_BYTES_S
    longest_s = MAX_SIGNAL_SHARE * 60 * limit_min
    return math.ceil(min(SIGNAL_TOLERANCE_S + 2 * time.step.total_s + writing_s, longest_s))
