"""The real module on the meta device at a given depth, with its method, as a run would have it."""

from __future__ import annotations

import copy
from typing import Any

import torch

from hpcft.config.hf_model import auto_model_class
from hpcft.core.records import Precision
from hpcft.methods import AnyMethod
from hpcft.methods.base import DTYPES
from hpcft.methods.qlora import NOT_QUANTISED
from hpcft.tasks.base import TaskBase

BLOCK = 64  # weights of one NF4 scale; bitsandbytes' default
SECOND_BLOCK = 256  # scales of one second scale, with double quantisation


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
    """The model in the types in which a run holds it, with `depth` layers."""
    config = with_depth(config, depth)
    config.use_cache = False
    config._attn_implementation = attention
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0  # a run takes the tokenizer's
    name = method.load_dtype(precision, zero_stage)
    with torch.device("meta"):
        model = auto_model_class(task).from_config(config, dtype=getattr(torch, name))
    if method.quantised_parameters(model):
        _quantise(model, method, getattr(torch, DTYPES[precision]))
    model = method.wrap(model, causal=task.causal, checkpointing=checkpointing)
    if zero_stage in (1, 2):  # of a model that was sharded as it loaded, adapters stay in fp32
        _cast(model, getattr(torch, DTYPES[precision]))
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)()
    return model.train()


def with_depth(config: Any, depth: int) -> Any:
    """A copy of the configuration with another number of layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    if kinds:
        text.layer_types = [kinds[i % len(kinds)] for i in range(depth)]
    text.num_hidden_layers = depth
    return config


def layer_period(config: Any, sequence_tokens: int) -> int:
    """After how many layers their types repeat; a window that nothing exceeds makes no type."""
    text = config.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or [])
    window = getattr(text, "sliding_window", None) or 0
    if window > sequence_tokens and set(kinds) <= {"sliding_attention", "full_attention"}:
        return 1
    return next(
        (p for p in range(1, len(kinds)) if all(a == b for a, b in zip(kinds, kinds[p:]))),  # noqa: B905
        max(1, len(kinds)),
    )


def layers_of(model: Any, depth: int) -> list[Any]:
    """The model's layers: its largest list of `depth` modules."""
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth]
    largest: Any = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))
    return list(largest)


def _quantise(model: Any, method: AnyMethod, compute: torch.dtype) -> None:
    """Puts bitsandbytes' 4-bit layers in the place of linear ones, without weights."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if type(module) is not torch.nn.Linear or {*name.split(".")} & {*NOT_QUANTISED}:
            continue
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
    """Weights in 4 bits, with their scales and tables, which are no parameters."""
    found = []
    for module in model.modules():
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is not None:
            second = state.state2
            found += [weight, state.absmax, state.code]
            found += [state.offset, second.absmax, second.code] if second is not None else []
    return found


def adapters(model: Any) -> list[torch.Tensor]:
    """Parameters that the method has put beside those of the model."""
    if not hasattr(model, "peft_config"):
        return []
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _cast(model: Any, dtype: torch.dtype) -> None:
    """DeepSpeed's engine casts parameters and buffers alike; 4-bit storage has the type already."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
