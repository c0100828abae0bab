"""Methods: one file each, from options to a model that is ready to train; `METHODS` lists them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from hpcft.methods.full import Full
from hpcft.methods.lora import LoRA
from hpcft.methods.qlora import QLoRA

METHODS = (Full, LoRA, QLoRA)

AnyMethod = Annotated[Full | LoRA | QLoRA, Field(discriminator="name")]
