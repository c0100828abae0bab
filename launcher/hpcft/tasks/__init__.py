"""Tasks: one file each, from data to features, prompts and metrics; `TASKS` lists them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from hpcft.tasks.classification import Classification
from hpcft.tasks.few_shot.task import FewShot
from hpcft.tasks.instruction import Instruction
from hpcft.tasks.pretraining import Pretraining
from hpcft.tasks.question_answering import QuestionAnswering

TASKS = (Classification, Instruction, FewShot, QuestionAnswering, Pretraining)

AnyTask = Annotated[
    Classification | Instruction | FewShot | QuestionAnswering | Pretraining,
    Field(discriminator="name"),
]
