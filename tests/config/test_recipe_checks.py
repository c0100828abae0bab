"""What the Trainer would refuse in the job is refused when the recipe is checked."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from builders import film_rows, load_one, recipe_problems, write_rows
from hpcft.core.errors import InputError
from hpcft.core.records import Train

NOT_THE_TRAINERS = {"global_batch_size", "packing", "per_device_train_batch_size"}
"""Fields that hpcft reads itself; the plan sets the micro-batch."""


@pytest.fixture(autouse=True)
def _with_validation(tiny: Path) -> None:
    write_rows(tiny.with_name("validation.jsonl"), film_rows(2))


SPLITS = "task.data.files.validation=validation.jsonl"


def trainer_refuses(train: Train) -> bool:
    """Returns whether the Trainer refuses the values of a recipe's `train` section."""
    values = train.model_dump(exclude=NOT_THE_TRAINERS)
    automatic = {name: value for name, value in values.items() if value != "auto"}
    try:
        TrainingArguments(output_dir="out", use_cpu=True, report_to=[], **automatic)
    except ValueError:
        return True
    return False


def test_checks_refuse_what_the_trainer_refuses_of_strategies_and_steps() -> None:
    """Every combination of when to score, when to save, and whether the best is kept."""
    strategies = ("no", "epoch", "steps")
    refused = []
    for evaluated, saved, eval_steps, save_steps in itertools.product(
        strategies, strategies, (None, 3, 4), (4, 6, 20)
    ):
        overrides = [
            SPLITS, f"train.eval_strategy={evaluated}", f"train.save_strategy={saved}",
            f"train.save_steps={save_steps}", "train.load_best_model_at_end=true",
            *([] if eval_steps is None else [f"train.eval_steps={eval_steps}"]),
        ]  # fmt: skip
        values: dict[str, Any] = {
            "eval_strategy": evaluated, "save_strategy": saved, "eval_steps": eval_steps,
            "save_steps": save_steps, "load_best_model_at_end": True,
        }  # fmt: skip
        try:
            load_one(*overrides)
            is_refused = False
        except InputError:
            is_refused = True
        # Without validation no checkpoint is the best, though the Trainer lets it pass.
        expected = trainer_refuses(Train(**values)) or evaluated == "no"
        assert is_refused == expected, overrides
        refused.append(is_refused)
    assert 0 < sum(refused) < len(refused)


def test_load_best_model_at_end_without_checkpoints_names_the_strategy_to_set() -> None:
    (problem,) = recipe_problems(SPLITS, "train.load_best_model_at_end=true")
    assert "train.save_strategy: expected epoch, as eval_strategy" in problem
    assert "set save_strategy: epoch" in problem


def test_save_steps_that_no_validation_follows_are_refused_with_the_next_multiple() -> None:
    (problem,) = recipe_problems(
        SPLITS, "train={eval_strategy: steps, save_strategy: steps, eval_steps: 3, save_steps: 4}",
        "train.load_best_model_at_end=true",
    )  # fmt: skip
    assert "train.save_steps: expected a multiple of eval_steps (3)" in problem
    assert "set save_steps: 6" in problem


@pytest.mark.parametrize("field", sorted(set(Train.model_fields) - NOT_THE_TRAINERS))
def test_trainer_takes_what_a_recipe_may_hold(field: str) -> None:
    """The ends of each field's range: what the record accepts, the Trainer accepts too."""
    values = {
        "max_steps": [-1, 0, 1], "num_train_epochs": [1e-6, 0.5, 1e6],
        "learning_rate": [1e-30, 9.9], "warmup_steps": [0, 0.5, 1, 1.5, 10],
        "weight_decay": [0, 9.9], "adam_beta1": [0.0, 0.999], "adam_beta2": [0.0, 0.9999],
        "adam_epsilon": [1e-30, 1], "max_grad_norm": [0, 1e6],
        "label_smoothing_factor": [0, 0.99], "eval_steps": [None, 1, 10**6],
        "save_steps": [1, 10**6], "save_total_limit": [None, 1, 100], "logging_steps": [1, 10**6],
        "dataloader_num_workers": [0, 64], "seed": [0, 2**32 - 1],
        "metric_for_best_model": [None, "loss", "accuracy"],
    }.get(field) or choices(field)  # fmt: skip
    for value in values:
        assert not trainer_refuses(Train(**{field: value})), (field, value)


def choices(field: str) -> list[Any]:
    """Returns the values of a field that has a list of them, or is true or false."""
    schema = Train.model_json_schema()["properties"][field]
    parts = schema.get("anyOf", [schema])
    names = [name for part in parts for name in part.get("enum", [])]
    is_boolean = any(part.get("type") == "boolean" for part in parts)
    assert names or is_boolean, field
    alone = field == "load_best_model_at_end"  # With the default strategies it is refused.
    return [*names, False, *([] if alone else [True])] if is_boolean else names
