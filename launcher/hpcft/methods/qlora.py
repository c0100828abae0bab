"""QLoRA: trains LoRA over a base in 4-bit NormalFloat (arXiv:2305.14314)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from hpcft.core.records import Precision
from hpcft.methods.base import DTYPES
from hpcft.methods.heads import head_modules
from hpcft.methods.lora import LoRA

# Output layers and heads are trained and must not be quantised, wherever they are in the model.
# Transformers' own choice leaves a decoder's `score` out, but not the `classifier` of BERT, RoBERTa
# and DistilBERT (seen in 5.23). A head may have other modules beside: DeBERTa's `pooler`,
# ModernBERT's `head`, EuroBERT's `dense`; `head_modules` finds them.
NOT_QUANTISED = ("lm_head", "embed_out", "score", "classifier", "pre_classifier", "qa_outputs")


class FourBit(Protocol):
    """A method with options for 4-bit weights."""

    @property
    def bnb_4bit_quant_type(self) -> Literal["nf4", "fp4"]:
        """4-bit data type of bitsandbytes."""

    @property
    def bnb_4bit_use_double_quant(self) -> bool:
        """Whether the scales of 4-bit weights are quantised too."""


class QLoRA(LoRA):
    """Trains low-rank updates over a 4-bit base; fields as in PEFT and `BitsAndBytesConfig`."""

    name: Literal["qlora"]  # type: ignore[assignment]
    """`qlora`."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type of bitsandbytes."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the scales too: 0.516 instead of 0.563 bytes a parameter."""

    @property
    def four_bit_change(self) -> dict[str, object]:
        """Nothing: the base is in 4 bits."""
        return {}

    @property
    def double_quantises(self) -> bool:
        """Whether the scales of 4-bit weights are quantised too."""
        return self.bnb_4bit_use_double_quant

    @property
    def zero_stages(self) -> tuple[int, ...]:
        """Not 3: each GPU would first load the whole base (Hugging Face's documentation)."""
        return (0, 1, 2)

    @property
    def loads_on_device(self) -> bool:
        """True: 4-bit weights are quantised on the device."""
        return True

    def load_options(
        self, precision: Precision, zero_stage: int, heads: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Returns arguments of `from_pretrained` for a 4-bit base on this rank's device."""
        return four_bit_options(self, precision, heads)

    def wrap(self, model: Any, *, causal: bool, checkpointing: bool) -> Any:
        """Returns the model with LoRA layers over the quantised base."""
        from peft import prepare_model_for_kbit_training

        if getattr(model, "is_loaded_in_4bit", False):
            _keep_differentiable(model)
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
        return super().wrap(model, causal=causal, checkpointing=checkpointing)

    def frozen_bytes(self, precision: Precision, zero_stage: int) -> int:
        """Returns the bytes of a weight of embeddings and head.

        PEFT's preparation casts them to fp32; DeepSpeed casts them back.
        """
        return super().frozen_bytes(precision, zero_stage) if zero_stage else 4

    def quantised_parameters(self, model: Any) -> int:
        """Returns the number of weights of all linear layers but those of the head."""
        return four_bit_parameters(model)


def four_bit_options(method: FourBit, precision: Precision, heads: Sequence[str]) -> dict[str, Any]:
    """Returns arguments of `from_pretrained` for a 4-bit model on this rank's device.

    Args:
        method: the method.
        precision: compute type of the run.
        heads: top-level modules of the task's head.
    """
    import os

    import torch
    from transformers import BitsAndBytesConfig

    compute = getattr(torch, DTYPES[precision])
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    return {
        "dtype": compute,
        "device_map": {"": device},
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=method.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=method.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=compute,
            bnb_4bit_quant_storage=compute,
            # For 4 bits too, despite the name. A plain name is taken for the end of a module's
            # name as well; the expression `^dense` stands for the module `dense` alone.
            llm_int8_skip_modules=[*NOT_QUANTISED, *(f"^{name}" for name in heads)],
        ),
    }


def four_bit_parameters(model: Any) -> int:
    """Returns the number of weights that are held in 4 bits: linear layers but not the head."""
    return sum(module.weight.numel() for module in four_bit_layers(model).values())


def four_bit_layers(model: Any) -> dict[str, Any]:
    """Returns the linear layers that are held in 4 bits, by name."""
    import torch

    heads = head_modules(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and name.partition(".")[0] not in heads
        and not {*name.split(".")} & {*NOT_QUANTISED}
    }


def _keep_differentiable(model: Any) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights for CPU inference.

    On a CPU with AVX512-BF16 the first evaluation repacks them for a kernel without a backward
    pass. Training after that evaluation gets no gradient through them, with only a warning (seen in
    bitsandbytes 0.50). On a GPU the attribute does nothing.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
