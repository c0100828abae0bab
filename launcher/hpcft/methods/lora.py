"""LoRA with PEFT: trains low-rank updates of frozen weights (arXiv:2106.09685)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from hpcft.core.records.base import SlurmWord
from hpcft.methods.base import MethodBase
from hpcft.methods.heads import head_modules, task_type, train_in_fp32


class LoRA(MethodBase):
    """Trains low-rank updates; fields have the names of PEFT's `LoraConfig`."""

    saves_adapter: ClassVar[bool] = True
    freezes_base: ClassVar[bool] = True

    name: Literal["lora"]
    """`lora`."""
    r: Annotated[int, Field(ge=1, le=4096)] = 16
    """Rank of the updates."""
    lora_alpha: Annotated[int, Field(ge=1)] = 16
    """Scale: updates are multiplied by lora_alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the updates."""
    target_modules: Literal["all-linear"] | list[SlurmWord] | None = None
    """Modules that get updates; null: PEFT's choice for the architecture (query and value)."""
    use_dora: bool = False
    """DoRA (arXiv:2402.09353): train magnitude and direction of the updates separately."""

    @property
    def four_bit_change(self) -> dict[str, object]:
        """QLoRA, which has the same fields."""
        return {"name": "qlora"}

    @property
    def needs_peft_to_load(self) -> bool:
        """True for DoRA: transformers 5.23 leaves the saved magnitudes out and does not say so."""
        return self.use_dora

    def wrap(self, model: Any, *, causal: bool, checkpointing: bool) -> Any:
        """Returns the model with LoRA layers and head to train, in fp32, and the base frozen."""
        from peft import LoraConfig, get_peft_model

        # Heads are trained whole; PEFT knows the names of some heads only.
        heads = head_modules(model)
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
            model.enable_input_require_grads()  # else frozen layers pass no gradient back
        on_meta = next(model.parameters()).is_meta
        wrapped = get_peft_model(model, config, low_cpu_mem_usage=on_meta)
        train_in_fp32(wrapped)  # the head too, which PEFT leaves in the base's type
        return wrapped
