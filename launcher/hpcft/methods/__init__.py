"""Lists the training methods: which weights are trained, and how they are loaded and saved."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field

from hpcft.methods.base import MethodBase

# Every method, as module and class of this package. A new method is a file and a line here.
METHODS = (
    "full:Full",
    "lora:LoRA",
    "qlora:QLoRA",
    "prompts:PTuning",
    "prompts:PromptTuning",
    "head_only:HeadOnly",
    "features:Features",
    "frozen:Frozen",
)


def _class_of(entry: str) -> Any:
    """Returns the class that an entry of METHODS names."""
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


if TYPE_CHECKING:
    AnyMethod = MethodBase
else:
    # A recipe's `method.name` chooses the class.
    AnyMethod = Annotated[Union[tuple(map(_class_of, METHODS))], Field(discriminator="name")]  # noqa: UP007
