"""Checks that a task can use every row of its data, before anything is queued."""

from __future__ import annotations

import json

from pydantic import Field

import hpcft
from hpcft.config import identity
from hpcft.config.recipe_types import FullRecipe
from hpcft.core.disk_cache import load_or_compute
from hpcft.core.records import Plan, StoredRecord
from hpcft.staging.check_choices import check_choices, tokenizer_state
from hpcft.tasks.data.examples import check_local_data


class RowsChecked(StoredRecord):
    """Cache entry: every row of a data set was read and passed a task's checks."""

    examples: dict[str, int]
    """Number of examples of each split."""
    warnings: list[str] = Field(default_factory=list)
    """Reasons to doubt the result, for example rows that are both trained on and scored."""

    def added_to(self, plan: Plan) -> Plan:
        """Returns a plan with the warnings about the data it is made for."""
        return plan.model_copy(update={"warnings": [*plan.warnings, *self.warnings]})


def has_local_data(recipe: FullRecipe) -> bool:
    """Returns whether the data of a recipe lie on this machine, so that they can be read."""
    data = recipe.task.data
    return data.files is not None or (data.path or "").startswith("/")


def check_rows(local: FullRecipe, *, fixed: bool) -> RowsChecked:
    """Reads and checks every row of local data, once for each task and content.

    Args:
        local: a recipe without hub names.
        fixed: whether the data never change under their path, as those of a commit; other data
            are hashed.

    Raises:
        InputError, DataError: rows cannot be used, or splits contradict each other.
    """
    scored, trains = local.evaluation.split, local.mode == "finetune"

    def check() -> RowsChecked:
        found = check_local_data(local.task, scored, trains=trains)
        check_choices(local, found.splits[scored])
        counts = {name: len(examples) for name, examples in found.splits.items()}
        return RowsChecked(examples=counts, warnings=found.warnings)

    task = local.task.model_dump(mode="json")
    content = {} if fixed else identity.compute_fingerprints(local, data_only=True)
    tokenizer = tokenizer_state(local)
    key = json.dumps([hpcft.__version__, task, scored, trains, content, tokenizer])
    return load_or_compute("rows", key, RowsChecked, check)
