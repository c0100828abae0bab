"""Methods: one file each, from options to a model that is ready to train; `METHODS` lists them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from hpcft.methods.features import Features
from hpcft.methods.frozen import Frozen
from hpcft.methods.full import Full
from hpcft.methods.head_only import HeadOnly
from hpcft.methods.lora import LoRA
from hpcft.methods.prompts import PromptTuning, PTuning
from hpcft.methods.qlora import QLoRA

METHODS = (Full, LoRA, QLoRA, PTuning, PromptTuning, HeadOnly, Features, Frozen)

AnyMethod = Annotated[
    Full | LoRA | QLoRA | PTuning | PromptTuning | HeadOnly | Features | Frozen,
    Field(discriminator="name"),
]
