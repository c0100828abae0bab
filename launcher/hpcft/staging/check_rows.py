"""Checks that a task can use every row of its data, before anything is queued."""

from __future__ import annotations

import json

import hpcft
from hpcft.config.recipe_types import FullRecipe
from hpcft.core.disk_cache import load_or_compute
from hpcft.core.records import StoredRecord
from hpcft.tasks.data.examples import check_local_data


class RowsChecked(StoredRecord):
    """Cache entry: every row of a data set was read and passed a task's checks."""

    examples: dict[str, int]
    """Number of examples of each split."""


def check_rows(local: FullRecipe, *, fixed: bool) -> None:
    """Reads and checks every row of local data.

    Args:
        local: a recipe without hub names.
        fixed: whether the data never change under their path, as those of a commit; they are then
            read only once for each task.

    Raises:
        InputError, DataError: rows cannot be used, or splits contradict each other.
    """
    scored = local.evaluation.split
    if not fixed:
        check_local_data(local.task, scored)
        return

    def check() -> RowsChecked:
        splits = check_local_data(local.task, scored)
        return RowsChecked(examples={name: len(examples) for name, examples in splits.items()})

    key = json.dumps([hpcft.__version__, local.task.model_dump(mode="json"), scored])
    load_or_compute("rows", key, RowsChecked, check)
