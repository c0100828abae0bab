"""Frozen: nothing is trained; the model is scored as it is, in 16 or in 4 bits."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from hpcft.methods.base import MethodBase
from hpcft.methods.qlora import four_bit_options, four_bit_parameters
from hpcft.records import Precision
from hpcft.records.base import OneLine

ADAPTER_FILE = "adapter_model.safetensors"


class Frozen(MethodBase):
    """Score the model as it is, for the task prompting; of `train` seed and precision count."""

    trains: ClassVar[bool] = False
    adapter: ClassVar[bool] = True
    frozen_base: ClassVar[bool] = True
    resumes: ClassVar[bool] = False

    name: Literal["frozen"]
    """`frozen`."""
    load_in_4bit: bool = False
    """Hold the linear layers in 4 bits (bitsandbytes): a third of the memory, and other answers."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit type."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the scales too: 0.516 instead of 0.563 bytes a parameter."""
    adapter_path: OneLine | None = None
    """Folder of an adapter that was trained over this model, for example a run's `model`. A
    `sweep.grid` over several compares adapters over one base."""

    @property
    def zero_stages(self) -> tuple[int, ...]:
        """There are only weights to shard, and those in 4 bits or with an adapter are not."""
        return (0,) if self.load_in_4bit or self.adapter_path else (0, 3)

    @property
    def loads_on_device(self) -> bool:
        """4-bit weights are made on the device."""
        return self.load_in_4bit

    def load_options(self, precision: Precision, zero_stage: int) -> dict[str, Any]:
        """Weights in the compute type, or in 4 bits."""
        if self.load_in_4bit:
            return four_bit_options(self, precision)
        return super().load_options(precision, zero_stage)

    def wrap(self, model: Any, *, causal: bool, checkpointing: bool) -> Any:
        """The model with its adapter, if there is one, and nothing to train.

        Raises:
            ValueError: the adapter was trained over another model.
        """
        model.requires_grad_(False)
        if self.adapter_path is None:
            return model
        from peft import PeftConfig, PeftModel, get_peft_model

        if not next(model.parameters()).is_meta:
            return PeftModel.from_pretrained(model, self.adapter_path)
        config = PeftConfig.from_pretrained(self.adapter_path)
        wrapped = get_peft_model(model, config, low_cpu_mem_usage=True)
        wrapped.requires_grad_(False)
        if not config.is_prompt_learning:
            _check_shapes(wrapped, self.adapter_path)
        return wrapped

    def quantised_parameters(self, model: Any) -> int:
        """Weights of all linear layers but those of the head, if they are in 4 bits."""
        return four_bit_parameters(model) if self.load_in_4bit else 0


def _check_shapes(model: Any, folder: str) -> None:
    """Compares what is in an adapter's file with what the model takes, without reading weights."""
    from pathlib import Path

    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    wanted = {name: list(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}
    with safe_open(Path(folder) / ADAPTER_FILE, "pt") as file:
        found = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    for name in wanted.keys() | found.keys():
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"{folder} was trained over another model: {name} has the shape {found.get(name)}, "
                f"this model takes {wanted.get(name)}"
            )
