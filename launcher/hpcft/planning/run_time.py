"""How long a run takes, and the time limit to ask for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.records import (
    Cluster,
    Layout,
    MemoryItem,
    ModelFacts,
    Precision,
    RunTime,
    Split,
    StepTime,
)
from hpcft.methods.base import COMPUTE_BYTES
from hpcft.planning.disk import checkpoint_bytes, model_bytes
from hpcft.planning.hardware import hardware_rates
from hpcft.planning.step_time import forward_flops, overhead_s
from hpcft.tasks.base import TaskBase

# Importing torch and DeepSpeed from a shared file system, meeting the other ranks, compiling.
START_S = 120.0
# A shared file system while others use it too.
SHARED_DISK_BYTES_S = 0.5e9
# The limit is the estimate times this: efficiency is a guess until runs have calibrated it, and a
# run that is killed by its limit costs more than one that would have been scheduled earlier.
TIME_MARGIN = 2.0
# And this, for slow starts of a cold cache.
ALLOWANCE_MIN = 10
ROUNDED_TO_MIN = 5
# Slurm may be a minute early with its word that time is nearly up (sbatch --signal), not late.
NOTICE_S = 60.0
# Of a short limit, the run itself is to have most.
MOST_OF_LIMIT = 0.25


def predict_run_time(
    step: StepTime,
    recipe: FullRecipe,
    facts: ModelFacts,
    layout: Layout,
    precision: Precision,
    cluster: Cluster,
    examples: Mapping[Split, int],
) -> RunTime:
    """Predicted time of a run; `examples` are the splits whose size is known."""
    train = recipe.train
    read = COMPUTE_BYTES[precision] * facts.parameters.total
    start_s = START_S + read / SHARED_DISK_BYTES_S
    if not recipe.method.trains:
        asked = examples.get(recipe.evaluation.split)
        return RunTime(
            step=step,
            steps=None if asked is None else _batches(recipe.task, layout, asked),
            start_s=start_s,
            evaluation_s=0.0,
            saving_s=0.0,
        )
    steps = total_steps(recipe, examples)
    scored = [examples.get(split) for split in _scored_splits(recipe, steps)]
    evaluation_s = None
    if None not in scored:
        reached = hardware_rates(cluster, precision, layout.ranks_per_node)
        tokens = recipe.task.max_length
        rows = sum(filter(None, scored)) * recipe.task.rows_per_example
        flops = rows * forward_flops(facts, tokens, tokens)
        evaluation_s = flops / reached.flops / layout.world_size
    saves = checkpoint_count(recipe, steps) or 0
    written = model_bytes(facts, recipe, layout, precision)
    if train.save_strategy != "no":
        written += saves * checkpoint_bytes(facts, recipe, layout, precision)
    return RunTime(
        step=step,
        steps=steps,
        start_s=start_s,
        evaluation_s=evaluation_s,
        saving_s=written / SHARED_DISK_BYTES_S,
    )


def with_generation(step: StepTime, tokens: int, facts: ModelFacts, layout: Layout) -> StepTime:
    """Returns a step's time with that of the tokens generated after it, one pass for each."""
    if not tokens:
        return step
    passes = 1 + tokens
    return StepTime(
        compute_s=step.compute_s + tokens * overhead_s(facts, layout),
        communication_s=passes * step.communication_s,
        offload_s=passes * step.offload_s,
    )


def _batches(task: TaskBase, layout: Layout, asked: int) -> int:
    """Returns the batches of a rank that score so many examples."""
    each = task.rows_per_batch(layout.per_device_train_batch_size)
    return math.ceil(asked * task.rows_per_example / (each * layout.world_size))


def total_steps(recipe: FullRecipe, examples: Mapping[Split, int]) -> int | None:
    """Optimizer steps of the run; None where the number of training examples is not known."""
    train = recipe.train
    if train.max_steps > 0:
        return train.max_steps
    if "train" not in examples:
        return None
    each = math.ceil(examples["train"] / train.global_batch_size)
    return math.ceil(each * train.num_train_epochs)


def _evaluations(recipe: FullRecipe, steps: int | None) -> int:
    """How often the validation split is scored during training."""
    train = recipe.train
    if train.eval_strategy == "no":
        return 0
    if train.eval_strategy == "steps" and train.eval_steps:
        return (steps or 0) // train.eval_steps
    return math.ceil(train.num_train_epochs)


def _scored_splits(recipe: FullRecipe, steps: int | None) -> list[Split]:
    """The splits that are scored, each as often as it is."""
    final: list[Split] = [recipe.evaluation.split] * (1 + recipe.evaluation.before)
    data = recipe.task.data
    has_validation = "validation" in (data.fractions or data.files or data.splits)
    return final + ["validation"] * (_evaluations(recipe, steps) if has_validation else 0)


def checkpoint_count(recipe: FullRecipe, steps: int | None) -> int | None:
    """Checkpoints that are written in all; None where that is not known."""
    train = recipe.train
    if train.save_strategy == "steps":
        return None if steps is None else max(1, steps // train.save_steps)
    return math.ceil(train.num_train_epochs) if train.save_strategy == "epoch" else 0


def time_limit_min(time: RunTime, recipe: FullRecipe, cluster: Cluster) -> int:
    """The time limit to ask for: what the recipe says, else from the estimate, in whole minutes.

    Where the estimate is not complete, or nobody waits for the end (a local run), it is the most
    that the profile allows.
    """
    wanted = recipe.resources.time_min
    if wanted != "auto":
        return wanted
    if time.run_s is None or cluster.scheduler == "local":
        return cluster.time_limit_min
    needed = TIME_MARGIN * time.run_s / 60 + ALLOWANCE_MIN
    return min(ROUNDED_TO_MIN * math.ceil(needed / ROUNDED_TO_MIN), cluster.time_limit_min)


def signal_delay_s(time: RunTime, disk: Sequence[MemoryItem], time_min: int) -> int:
    """Seconds before its time limit at which a job is signalled: time for two steps and a save.

    Args:
        time: the predicted time of the run.
        disk: what the run writes.
        time_min: the job's time limit in minutes.
    """
    written_s = sum(item.bytes for item in disk) / SHARED_DISK_BYTES_S
    most_s = MOST_OF_LIMIT * 60 * time_min
    return math.ceil(min(NOTICE_S + 2 * time.step.total_s + written_s, most_s))
