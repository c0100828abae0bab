"""Packs the examples of a micro-batch one after another into one row, without padding.

Positions restart with each example and attention stays inside it, so that loss and gradients are
those of the same examples padded, and a global batch holds the same examples. `transformers` would
build a mask of T · T entries for such a row and let the kernel compute all of them. Here each
example is attended to by itself, with the causal kernel and without a mask.

Shapes: T tokens of a row, S those of an example, A attention heads, K heads of keys and values,
D the width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hpcft.core.records import ModelSpec
from hpcft.methods.base import MethodBase
from hpcft.tasks.base import IGNORE_INDEX, ModelInputs, TaskBase

ATTENTION = "hpcft_packed"
"""Name of this attention in `transformers`: `sdpa`, extended to rows of several examples."""

# tests/tasks/test_packing.py compares loss and gradients of each type with those of padded batches.
# Other types compute positions in their own way (Falcon, OPT), carry states through the whole row
# (Falcon-H1, Qwen3-Next), or do not use PyTorch's attention (Gemma 2, whose scores are capped).
MODEL_TYPES = frozenset(
    {
        "cohere", "gemma", "gemma3_text", "glm4", "gpt2", "gpt_neox", "granite", "llama", "mistral",
        "mixtral", "olmo2", "olmo3", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3",
        "starcoder2",
    }
)  # fmt: skip


def packing_blocker(
    task: TaskBase, method: MethodBase, model: ModelSpec, model_type: str
) -> str | None:
    """Returns why examples cannot share a row; None if they can.

    Args:
        task: the task; a packed row needs a label for each token, and reading from left to right.
        method: the method; virtual tokens would stand in front of the row, not of each example.
        model: the recipe's model, which names the attention.
        model_type: the model's `transformers` type.
    """
    if not (task.causal and task.labels_per_token):
        return f"examples of {task.name} are not read from left to right, token by token"
    if not method.trains:
        return f"{method.name} takes no steps"
    if method.virtual_tokens:
        return f"{method.name} puts tokens in front of each example"
    if model.attn_implementation != "sdpa":
        return f"packing needs attn_implementation: sdpa, got {model.attn_implementation}"
    if model_type not in MODEL_TYPES:
        return f"packing has not been tested with {model_type} models"
    return None


def pack(rows: Sequence[ModelInputs]) -> dict[str, Any]:
    """Makes a batch of one row: ids, positions and labels (1, T), and the examples' lengths."""
    import torch

    lengths = [len(row["input_ids"]) for row in rows]
    # The last token of an example must not predict the first token of the next.
    labels = [label for row in rows for label in (IGNORE_INDEX, *row["labels"][1:])]
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "labels": torch.tensor([labels]),
        "lengths": lengths,
    }


def split_packed(batch: Mapping[str, Any], max_tokens: int) -> list[dict[str, Any]]:
    """Splits a packed batch into several of at most `max_tokens`, or of a single example."""
    groups: list[list[int]] = []
    for length in batch["lengths"]:
        if groups and sum(groups[-1]) + length <= max_tokens:
            groups[-1].append(length)
        else:
            groups.append([length])
    sizes = [sum(group) for group in groups]
    tensors = {
        name: tensor.split(sizes, dim=1) for name, tensor in batch.items() if name != "lengths"
    }
    return [
        {**{name: parts[index] for name, parts in tensors.items()}, "lengths": group}
        for index, group in enumerate(groups)
    ]


def register_attention() -> str:
    """Registers the attention with `transformers` and returns its name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _packed_attention_forward)
    AttentionMaskInterface.register(ATTENTION, _packed_mask)
    return ATTENTION


def _packed_mask(**options: Any) -> Any:
    """Returns the mask of `sdpa`; None for a packed row, the only one without a padding mask."""
    from transformers.masking_utils import sdpa_mask

    return None if options["attention_mask"] is None else sdpa_mask(**options)


def _packed_attention_forward(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    lengths: Sequence[int] | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Any, None]:
    """Computes attention of queries (1, A, T, D) to keys and values (1, K, T, D): (1, T, A, D)."""
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if lengths is None:
        result: tuple[Any, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **options
        )
        return result
    examples = zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True)
    outputs = [_attend_example(q, k, v, sliding_window, dropout, scaling) for q, k, v in examples]
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1), None


def _attend_example(
    query: Any, key: Any, value: Any, window: int | None, dropout: float, scaling: float | None
) -> Any:
    """Computes causal attention of queries (1, A, S, D) to keys and values (1, K, S, D)."""
    import torch

    tokens = query.shape[2]
    mask = None
    if window is not None and tokens > window:
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
        mask = mask.triu(1 - window)  # a token sees itself and those before it, `window` in all
    groups = query.shape[1] // key.shape[1]
    shares_heads = groups > 1 and mask is None and _kernel_shares_heads(query)
    if groups > 1 and not shares_heads:
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=shares_heads,
    )


def _kernel_shares_heads(query: Any) -> bool:
    """Returns whether a fast kernel lets several query heads read one key head, without a mask.

    On CUDA only flash attention does; elsewhere PyTorch would write all scores to memory
    (sdp_utils.cpp).
    """
    import torch

    if query.device.type != "cuda":
        return True
    has_flash = torch.cuda.get_device_capability(query.device) >= (8, 0)
    return has_flash and query.element_size() == 2 and query.shape[-1] <= 256
