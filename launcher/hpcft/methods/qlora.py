"""QLoRA: LoRA over a base held in 4-bit NormalFloat (Dettmers et al. 2023, arXiv:2305.14314)."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from hpcft.core.records import Precision
from hpcft.methods.base import DTYPES
from hpcft.methods.lora import LoRA

# Heads stay out of 4 bits: they are trained. Transformers' own choice keeps a decoder's `score` but
# quantises the `classifier` of BERT, RoBERTa and DistilBERT (seen in 5.23), hence by name.
NOT_QUANTISED = ("lm_head", "embed_out", "score", "classifier", "pre_classifier", "qa_outputs")


class FourBit(Protocol):
    """A method that says how weights are held in 4 bits."""

    @property
    def bnb_4bit_quant_type(self) -> Literal["nf4", "fp4"]:
        """4-bit type."""

    @property
    def bnb_4bit_use_double_quant(self) -> bool:
        """Whether the scales are quantised too."""


class QLoRA(LoRA):
    """Train low-rank updates over a 4-bit base; names as in PEFT and `BitsAndBytesConfig`."""

    name: Literal["qlora"]  # type: ignore[assignment]
    """`qlora`."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit type."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the scales too: 0.516 instead of 0.563 bytes a parameter."""

    @property
    def double_quantises(self) -> bool:
        """Whether the scales are quantised too."""
        return self.bnb_4bit_use_double_quant

    @property
    def zero_stages(self) -> tuple[int, ...]:
        """Not 3: it would first load the whole base on every GPU (HF documentation)."""
        return (0, 1, 2)

    @property
    def loads_on_device(self) -> bool:
        """4-bit weights are made on the device."""
        return True

    def load_options(self, precision: Precision, zero_stage: int) -> dict[str, Any]:
        """A 4-bit base on this rank's own device."""
        return four_bit_options(self, precision)

    def wrap(self, model: Any, *, causal: bool, checkpointing: bool) -> Any:
        """LoRA layers over the quantised base, prepared for training in 4 bits."""
        from peft import prepare_model_for_kbit_training

        if getattr(model, "is_loaded_in_4bit", False):
            _keep_differentiable(model)
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
        return super().wrap(model, causal=causal, checkpointing=checkpointing)

    def frozen_bytes(self, precision: Precision, zero_stage: int) -> int:
        """Embeddings and head: PEFT's preparation makes them fp32; DeepSpeed casts them back."""
        return super().frozen_bytes(precision, zero_stage) if zero_stage else 4

    def quantised_parameters(self, model: Any) -> int:
        """Weights of all linear layers but those of the head."""
        return four_bit_parameters(model)


def four_bit_options(method: FourBit, precision: Precision) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a 4-bit model on this rank's own device."""
    import os

    import torch
    from transformers import BitsAndBytesConfig

    compute = getattr(torch, DTYPES[precision])
    here = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    return {
        "dtype": compute,
        "device_map": {"": here},
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=method.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=method.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=compute,
            bnb_4bit_quant_storage=compute,
            llm_int8_skip_modules=list(NOT_QUANTISED),  # of 4-bit loading too, despite its name
        ),
    }


def four_bit_parameters(model: Any) -> int:
    """Weights that a 4-bit model holds in 4 bits: all linear layers but those of the head."""
    import torch

    return sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not {*name.split(".")} & {*NOT_QUANTISED}
    )


def _keep_differentiable(model: Any) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights for CPU inference.

    On a CPU with AVX512-BF16 the first evaluation repacks them for a kernel without a backward
    pass; training that goes on afterwards gets no gradient through them, with a mere warning (seen
    in bitsandbytes 0.50). On a GPU the attribute does nothing.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
