"""Frozen: nothing is trained; what was trained before is scored, in 16 or in 4 bits."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal

from hpcft.core.errors import DataError
from hpcft.core.records import Precision
from hpcft.core.records.base import OneLine
from hpcft.methods.base import MethodBase
from hpcft.methods.heads import head_modules
from hpcft.methods.qlora import four_bit_options, four_bit_parameters

ADAPTER_FILE = "adapter_model.safetensors"


class Frozen(MethodBase):
    """Score a model as it is, or an adapter over it; of `train` seed and precision count.

    Any task but a prompt needs what was trained for it: the weights of its head come from the
    adapter or lie in the model's folder.
    """

    trains: ClassVar[bool] = False
    adapter: ClassVar[bool] = True
    frozen_base: ClassVar[bool] = True
    can_resume: ClassVar[bool] = False

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
    def adapter_folder(self) -> str | None:
        """Folder of the adapter, if one is scored."""
        return self.adapter_path

    @property
    def double_quantises(self) -> bool:
        """Whether the scales are quantised too."""
        return self.bnb_4bit_use_double_quant

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

        for name in head_modules(model):
            model.get_submodule(name).float()  # an adapter's head was trained, and saved, in fp32
        if not next(model.parameters()).is_meta:
            return PeftModel.from_pretrained(model, self.adapter_path).requires_grad_(False)
        config = PeftConfig.from_pretrained(self.adapter_path)
        config.base_model_name_or_path = None  # PEFT warns where it is another path
        return get_peft_model(model, config, low_cpu_mem_usage=True).requires_grad_(False)

    def check_saved(self, model: Any, folder: str | None) -> None:
        """Refuses an adapter of another model, and a head that nobody has trained."""
        if self.adapter_path:
            self._check_adapter(model)
        base = model.get_base_model() if self.adapter_path else model
        heads = [name for name in head_modules(base) if not self._brings(name)]
        if heads and folder:
            saved = _shapes(folder)
            self.check_loaded(
                name for name in heads if not any(f".{name}." in f".{key}" for key in saved)
            )
            _check_labels(base.config, folder)

    def check_loaded(self, missing: Iterable[str]) -> None:
        """Refuses to score weights that were drawn at random."""
        random = [name for name in missing if not self._brings(name)]
        if random:
            raise DataError(
                f"method.frozen: no file has weights of {', '.join(random[:5])}: the score would "
                "be that of a coin; name what was trained for this task, as model.path or "
                "method.adapter_path"
            )

    def _brings(self, name: str) -> bool:
        """Whether the adapter's file has weights of a module, or of a parameter."""
        brought = _shapes(self.adapter_path) if self.adapter_path else {}
        return any(f".{name}." in f"{key}." for key in brought)

    def quantised_parameters(self, model: Any) -> int:
        """Weights of all linear layers but those of the head, if they are in 4 bits."""
        return four_bit_parameters(model) if self.load_in_4bit else 0

    def _check_adapter(self, model: Any) -> None:
        from peft import get_peft_model_state_dict

        assert self.adapter_path is not None
        if model.active_peft_config.is_prompt_learning:
            return
        given = get_peft_model_state_dict(model)
        wanted = {name: list(tensor.shape) for name, tensor in given.items()}
        found = _shapes(self.adapter_path)
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise DataError(
                    f"method.frozen: {self.adapter_path} was trained over another model: {name} "
                    f"has the shape {found.get(name)}, this model takes {wanted.get(name)}"
                )


def _shapes(folder: str) -> dict[str, list[int]]:
    """Shapes of the weights in a folder's files; of a name of the hub, which is none, nothing."""
    from safetensors import safe_open

    found: dict[str, list[int]] = {}
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return found


def _check_labels(config: Any, folder: str) -> None:
    """Refuses labels that the model was trained with in another order."""
    file = Path(folder) / "config.json"
    saved = json.loads(file.read_text()).get("id2label") if file.is_file() else None
    if not saved:
        return
    theirs = [str(saved[key]) for key in sorted(saved, key=int)]
    ours = [str(label) for _, label in sorted(config.id2label.items())]
    lower = [[label.lower() for label in labels] for labels in (ours, theirs)]
    if lower[0] != lower[1] and sorted(lower[0]) == sorted(lower[1]):
        raise DataError(f"task.labels: {folder} has them in another order: {', '.join(theirs)}")
