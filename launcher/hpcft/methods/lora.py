"""LoRA: low-rank updates beside frozen weights (Hu et al. 2021, arXiv:2106.09685), through PEFT."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from hpcft.core.records.base import SlurmWord
from hpcft.methods.base import MethodBase
from hpcft.methods.heads import head_modules, task_type, train_in_fp32


class LoRA(MethodBase):
    """Train low-rank updates; fields bear the names of PEFT's `LoraConfig`."""

    adapter: ClassVar[bool] = True
    frozen_base: ClassVar[bool] = True

    name: Literal["lora"]
    """`lora`."""
    r: Annotated[int, Field(ge=1, le=4096)] = 16
    """Rank of the updates."""
    lora_alpha: Annotated[int, Field(ge=1)] = 16
    """Scale: updates are multiplied by lora_alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout in front of the updates."""
    target_modules: Literal["all-linear"] | list[SlurmWord] | None = None
    """Modules that get updates; None: PEFT's choice for the architecture (query and value)."""
    use_dora: bool = False
    """DoRA: train the magnitude apart from the direction."""

    def wrap(self, model: Any, *, causal: bool, checkpointing: bool) -> Any:
        """The model with LoRA layers, base frozen, in fp32 where the adapter is trained."""
        from peft import LoraConfig, get_peft_model

        heads = head_modules(model)  # trained as they are: PEFT knows the names of some only
        config = LoraConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.target_modules,
            use_dora=self.use_dora,
            task_type=task_type(model, causal=causal),
            modules_to_save=heads or None,
        )
        if checkpointing:
            model.enable_input_require_grads()  # else nothing flows back through frozen layers
        on_meta = next(model.parameters()).is_meta
        wrapped = get_peft_model(model, config, low_cpu_mem_usage=on_meta)
        train_in_fp32(wrapped)  # the head too, which PEFT leaves in the base's type
        return wrapped
