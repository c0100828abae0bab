"""Builds the real module on the meta device at a given depth, with its method, as in a run."""

from __future__ import annotations

import copy
from typing import Any

import torch

from hpcft.config.hf_model import auto_model_class
from hpcft.core.records import Precision
from hpcft.methods import AnyMethod
from hpcft.methods.base import DTYPES
from hpcft.methods.qlora import four_bit_layers
from hpcft.tasks.base import TaskBase

BLOCK = 64  # Weights per NF4 scale; bitsandbytes' default.
SECOND_BLOCK = 256  # Scales per second scale, with double quantisation.


def build_model(
    config: Any,
    task: TaskBase,
    method: AnyMethod,
    *,
    precision: Precision,
    zero_stage: int,
    depth: int,
    checkpointing: bool,
    attention: str,
) -> Any:
    """Returns the model on the meta device, in training mode and in the types of a run.

    Args:
        config: `transformers` configuration of the full model.
        task: the task, which chooses the model's head.
        method: the method, which wraps and quantises the model.
        precision: compute precision.
        zero_stage: DeepSpeed ZeRO stage; 0 is without DeepSpeed.
        depth: number of layers.
        checkpointing: whether activations are recomputed in the backward pass.
        attention: attention implementation, as in `transformers`.
    """
    config = with_depth(config, depth)
    config.use_cache = False
    config._attn_implementation = attention
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0  # A run takes the tokenizer's.
    name = method.load_dtype(precision, zero_stage)
    with torch.device("meta"):
        model = auto_model_class(task).from_config(config, dtype=getattr(torch, name))
    if method.quantised_parameters(model):
        _quantise(model, method, getattr(torch, DTYPES[precision]))
    model = method.wrap(model, causal=task.causal, checkpointing=checkpointing)
    if zero_stage in (1, 2):
        # Under ZeRO-3 the model is sharded while it loads, and adapters stay in fp32.
        _cast(model, getattr(torch, DTYPES[precision]))
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)()
    return model.train()


def with_depth(config: Any, depth: int) -> Any:
    """Returns a copy of the configuration with another number of layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    types = getattr(text, "layer_types", None)
    if types:
        text.layer_types = [types[i % len(types)] for i in range(depth)]
    text.num_hidden_layers = depth
    return config


def layer_period(config: Any, sequence_tokens: int) -> int:
    """Returns the number of layers after which the layer types repeat.

    Layers with a sliding window larger than the sequence count as layers with full attention.
    """
    text = config.get_text_config()
    types = list(getattr(text, "layer_types", None) or [])
    window = getattr(text, "sliding_window", None) or 0
    if window > sequence_tokens and set(types) <= {"sliding_attention", "full_attention"}:
        return 1
    return next(
        (p for p in range(1, len(types)) if all(a == b for a, b in zip(types, types[p:]))),  # noqa: B905
        max(1, len(types)),
    )


def layers_of(model: Any, depth: int) -> list[Any]:
    """Returns the model's layers: its largest module list of length `depth`."""
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth]
    largest: Any = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))
    return list(largest)


def _quantise(model: Any, method: AnyMethod, compute: torch.dtype) -> None:
    """Replaces linear layers by bitsandbytes' 4-bit layers, without weights."""
    import bitsandbytes as bnb

    for name, module in four_bit_layers(model).items():
        nested = method.double_quantises
        parent = model.get_submodule(name.rpartition(".")[0])
        with torch.device("meta"):
            new = bnb.nn.Linear4bit(
                module.in_features, module.out_features, module.bias is not None, compute,
                compress_statistics=nested,
            )  # fmt: skip
            if module.bias is not None:
                new.bias = module.bias
            state = _quant_state(bnb.functional, module.weight, nested, compute)
            size = module.weight.numel()
            packed = torch.empty(((size + 1) // 2 // compute.itemsize, 1), dtype=compute)
            new.weight = bnb.nn.Params4bit(
                packed, requires_grad=False, quant_state=state, blocksize=BLOCK,
                compress_statistics=nested, quant_storage=compute, module=new,
                bnb_quantized=True,
            )  # fmt: skip
        new.quant_state = state
        setattr(parent, name.rpartition(".")[2], new)
    model.is_loaded_in_4bit = True


def _quant_state(functional: Any, weight: torch.Tensor, nested: bool, dtype: torch.dtype) -> Any:
    scales = -(-weight.numel() // BLOCK)
    second = None
    if nested:
        second = functional.QuantState(
            absmax=torch.empty(-(-scales // SECOND_BLOCK)), blocksize=SECOND_BLOCK,
            code=torch.empty(256), dtype=torch.float32,
        )  # fmt: skip
    return functional.QuantState(
        absmax=torch.empty(scales, dtype=torch.uint8 if nested else torch.float32),
        shape=weight.shape,
        code=torch.empty(16),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=torch.empty(()) if nested else None,
        state2=second,
    )


def four_bit_tensors(model: Any) -> list[torch.Tensor]:
    """Returns the 4-bit weights with their scales and tables, which are not parameters."""
    tensors = []
    for module in model.modules():
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is not None:
            second = state.state2
            tensors += [weight, state.absmax, state.code]
            tensors += [state.offset, second.absmax, second.code] if second is not None else []
    return tensors


def adapter_parameters(model: Any) -> list[torch.Tensor]:
    """Returns the parameters that a PEFT method added to the model."""
    if not hasattr(model, "peft_config"):
        return []
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _cast(model: Any, dtype: torch.dtype) -> None:
    """Casts parameters and buffers, as DeepSpeed's engine does.

    The packed storage of 4-bit weights is in the compute type already.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
