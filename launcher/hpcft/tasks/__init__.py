"""Turns the rows of a data set into model inputs, and the model's outputs into metrics."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field

from hpcft.tasks.base import TaskBase

# Every task, as module and class of this package. A new task is one file and one line here.
TASKS = (
    "classification:Classification",
    "instruction:Instruction",
    "few_shot.task:FewShot",
    "question_answering:QuestionAnswering",
    "pretraining:Pretraining",
)


def _load_class(entry: str) -> Any:
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


if TYPE_CHECKING:
    AnyTask = TaskBase
else:
    # A recipe's `task.name` chooses the class.
    AnyTask = Annotated[Union[tuple(map(_load_class, TASKS))], Field(discriminator="name")]  # noqa: UP007
