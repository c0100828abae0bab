"""Tasks: one file each, from data to features, prompts and metrics; `TASKS` lists them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from hpcft.tasks.classification import Classification
from hpcft.tasks.instruction import Instruction

TASKS = (Classification, Instruction)

AnyTask = Annotated[Classification | Instruction, Field(discriminator="name")]
