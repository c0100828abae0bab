"""Whether every row of the data is of use to the task, before anything is queued."""

from __future__ import annotations

import json

import hpcft
from hpcft.config.recipe_types import FullRecipe
from hpcft.core.disk_cache import cached
from hpcft.core.records import StoredRecord
from hpcft.tasks.data.examples import check_local_data


class RowsChecked(StoredRecord):
    """That every row of a data set was read and is of use to a task."""

    examples: dict[str, int]
    """Examples of each split."""


def check_rows(local: FullRecipe, *, fixed: bool) -> None:
    """Reads and checks every row of local data.

    Args:
        local: a recipe without hub names.
        fixed: whether the data never change under their path, as those of a commit: they are then
            read once for each task.

    Raises:
        InputError, DataError: rows cannot be used, or splits do not go together.
    """
    scored = local.evaluation.split
    if not fixed:
        check_local_data(local.task, scored)
        return

    def check() -> RowsChecked:
        splits = check_local_data(local.task, scored)
        return RowsChecked(examples={name: len(examples) for name, examples in splits.items()})

    key = json.dumps([hpcft.__version__, local.task.model_dump(mode="json"), scored])
    cached("rows", key, RowsChecked, check)
