"""Frozen: scores a model or an adapter without training, in 16 or in 4 bits."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from hpcft.core.errors import DataError
from hpcft.core.records import Precision
from hpcft.core.records.base import OneLine
from hpcft.methods.base import MethodBase
from hpcft.methods.heads import head_modules
from hpcft.methods.qlora import four_bit_options, four_bit_parameters
from hpcft.methods.saved_weights import weight_shapes

ADAPTER_FILE = "adapter_model.safetensors"


class Frozen(MethodBase):
    """Scores a model without training it, or a trained adapter over it.

    Of `train` only seed and precision count. Every task but prompting needs a head that was trained
    for it: its weights come from the adapter or from the model's folder.
    """

    trains: ClassVar[bool] = False
    saves_adapter: ClassVar[bool] = True
    freezes_base: ClassVar[bool] = True
    can_resume: ClassVar[bool] = False

    name: Literal["frozen"]
    """`frozen`."""
    load_in_4bit: bool = False
    """Hold the linear layers in 4 bits (bitsandbytes): a third of the memory; scores change."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type of bitsandbytes."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the scales too: 0.516 instead of 0.563 bytes a parameter."""
    adapter_path: OneLine | None = None
    """Folder of an adapter that was trained over this model, for example `model` of a run's folder.
    A `sweep.grid` over several folders compares adapters over one base."""

    @property
    def adapter_folder(self) -> str | None:
        """Folder of the adapter; None if the model is scored without one."""
        return self.adapter_path

    @property
    def double_quantises(self) -> bool:
        """Whether the scales of 4-bit weights are quantised too."""
        return self.bnb_4bit_use_double_quant

    @property
    def four_bit_change(self) -> dict[str, object]:
        """`load_in_4bit: true`, unless it is set."""
        return {} if self.load_in_4bit else {"load_in_4bit": True}

    @property
    def zero_stages(self) -> tuple[int, ...]:
        """0, and 3 to shard the weights, which does not work in 4 bits or with an adapter."""
        return (0,) if self.load_in_4bit or self.adapter_path else (0, 3)

    @property
    def loads_on_device(self) -> bool:
        """True in 4 bits: the weights are quantised on the device."""
        return self.load_in_4bit

    def load_options(
        self, precision: Precision, zero_stage: int, heads: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Returns arguments of `from_pretrained`, for the compute type or for 4 bits."""
        if self.load_in_4bit:
            return four_bit_options(self, precision, heads)
        return super().load_options(precision, zero_stage)

    def wrap(self, model: Any, *, causal: bool, checkpointing: bool) -> Any:
        """Returns the model with its adapter, if there is one, and with all parameters frozen.

        Raises:
            ValueError: the adapter was trained over another model.
        """
        model.requires_grad_(False)
        if self.adapter_path is None:
            return model
        from peft import PeftConfig, PeftModel, get_peft_model

        for name in head_modules(model):
            model.get_submodule(name).float()  # an adapter's head was trained and saved in fp32
        if not next(model.parameters()).is_meta:
            return PeftModel.from_pretrained(model, self.adapter_path).requires_grad_(False)
        config = PeftConfig.from_pretrained(self.adapter_path)
        config.base_model_name_or_path = None  # PEFT warns if it is another path
        return get_peft_model(model, config, low_cpu_mem_usage=True).requires_grad_(False)

    def check_saved_weights(self, model: Any, folder: str | None) -> None:
        """Checks that the adapter fits the model, and that the head has trained weights."""
        if self.adapter_path:
            self._check_adapter(model)
        base = model.get_base_model() if self.adapter_path else model
        heads = [name for name in head_modules(base) if not self._adapter_has(name)]
        if heads and folder:
            saved = weight_shapes(folder)
            self.check_missing_weights(
                name for name in heads if not any(f".{name}." in f".{key}" for key in saved)
            )
            _check_labels(base.config, folder)

    def check_missing_weights(self, missing: Iterable[str]) -> None:
        """Checks that the scored model has no random weights."""
        random = [name for name in missing if not self._adapter_has(name)]
        if random:
            raise DataError(
                f"method.frozen: no file has weights of {', '.join(random[:5])}, so they would be "
                "random; set model.path or method.adapter_path to a model that was trained for "
                "this task"
            )

    def _adapter_has(self, name: str) -> bool:
        """Returns whether the adapter has weights of this module or parameter."""
        shapes = _adapter_shapes(self.adapter_path) if self.adapter_path else {}
        return any(f".{name}." in f"{key}." for key in shapes)

    def quantised_parameters(self, model: Any) -> int:
        """Returns the number of weights of linear layers but the head's, if they are in 4 bits."""
        return four_bit_parameters(model) if self.load_in_4bit else 0

    def _check_adapter(self, model: Any) -> None:
        """Checks that the adapter's weights have the shapes that the model needs.

        Raises:
            DataError: they have others.
        """
        from peft import get_peft_model_state_dict

        assert self.adapter_path is not None
        if model.active_peft_config.is_prompt_learning:
            return
        weights = get_peft_model_state_dict(model)
        needed = {name: list(tensor.shape) for name, tensor in weights.items()}
        saved = _adapter_shapes(self.adapter_path)
        for name in sorted(needed.keys() | saved.keys()):
            if needed.get(name) != saved.get(name):
                raise DataError(
                    f"method.frozen: {self.adapter_path} was trained over another model: {name} "
                    f"has the shape {saved.get(name)}, this model needs {needed.get(name)}; "
                    "correct method.adapter_path or model.path"
                )


def _adapter_shapes(folder: str) -> dict[str, list[int]]:
    """Returns the shapes of an adapter's weights; its folder may hold those of its base too."""
    return weight_shapes(folder, ADAPTER_FILE)


def _check_labels(config: Any, folder: str) -> None:
    """Checks that the recipe's labels have the order that the model was trained with.

    Raises:
        DataError: they are the same labels in another order.
    """
    file = Path(folder) / "config.json"
    saved = json.loads(file.read_text(encoding="utf-8")).get("id2label") if file.is_file() else None
    if not saved:
        return
    theirs = [str(saved[key]) for key in sorted(saved, key=int)]
    ours = [str(label) for _, label in sorted(config.id2label.items())]
    lower = [[label.lower() for label in labels] for labels in (ours, theirs)]
    if lower[0] != lower[1] and sorted(lower[0]) == sorted(lower[1]):
        raise DataError(
            f"task.labels: {folder} has them in another order; use [{', '.join(theirs)}]"
        )
