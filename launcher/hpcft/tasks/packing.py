"""Packing: the examples of a micro-batch one after another in one row, without padding.

Positions begin anew with each example and attention stays inside it, so that loss and gradients
are those of the same examples padded, and a global batch is the same examples. `transformers` would
make a mask of T · T entries for such a row and let the kernel compute them all; here each example
is attended to by itself, with the causal kernel and without a mask.

Shapes: T tokens of a row, S those of an example, A attention heads, K heads of keys and values,
D the width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hpcft.core.records import ModelSpec
from hpcft.methods.base import MethodBase
from hpcft.tasks.base import IGNORED, ModelInputs, TaskBase

ATTENTION = "hpcft_packed"
"""Name of this attention for `transformers`: that of `sdpa`, but for rows with several examples."""

# Loss and gradients of each are compared with those of padded batches in tests/tasks/test_packing.py.
# Others have positions of their own making (Falcon, OPT), states that run on through the row
# (Falcon-H1, Qwen3-Next), or attention that is not PyTorch's (Gemma 2, whose scores are capped).
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
    """Why examples cannot share a row; None where they can.

    Args:
        task: what is trained; a row needs labels for each token, from left to right.
        method: how. Virtual tokens stand in front of a row, not of each example in it.
        model: which attention is asked for.
        model_type: the model's `transformers` type.
    """
    if not (task.causal and task.labels_per_token):
        return f"examples of {task.name} are not read from left to right, token by token"
    if not method.trains:
        return f"{method.name} takes no steps"
    if method.extra_tokens:
        return f"{method.name} puts tokens in front of each example"
    if model.attn_implementation != "sdpa":
        return f"attention is {model.attn_implementation}"
    if model_type not in MODEL_TYPES:
        return f"it is not known to be right for a {model_type} model"
    return None


def pack(rows: Sequence[ModelInputs]) -> dict[str, Any]:
    """A batch of one row: ids, positions and labels (1, T), and the examples' lengths."""
    import torch

    lengths = [len(row["input_ids"]) for row in rows]
    # No token predicts the first one of the next example.
    labels = [label for row in rows for label in (IGNORED, *row["labels"][1:])]
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "labels": torch.tensor([labels]),
        "lengths": lengths,
    }


def split_packed(batch: Mapping[str, Any], most_tokens: int) -> list[dict[str, Any]]:
    """A packed batch as several, each of at most so many tokens or of a single example."""
    groups: list[list[int]] = []
    for length in batch["lengths"]:
        if groups and sum(groups[-1]) + length <= most_tokens:
            groups[-1].append(length)
        else:
            groups.append([length])
    sizes = [sum(group) for group in groups]
    tensors = {n: part.split(sizes, dim=1) for n, part in batch.items() if n != "lengths"}
    return [
        {**{name: parts[index] for name, parts in tensors.items()}, "lengths": group}
        for index, group in enumerate(groups)
    ]


def register_attention() -> str:
    """Makes the attention known to `transformers`; its name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, _mask)
    return ATTENTION


def _mask(**given: Any) -> Any:
    """The mask of `sdpa`; none for a packed row, which is the one that comes without a mask."""
    from transformers.masking_utils import sdpa_mask

    return None if given["attention_mask"] is None else sdpa_mask(**given)


def _attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    lengths: Sequence[int] | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Any, None]:
    """Attention of queries (1, A, T, D) to keys and values (1, K, T, D), as (1, T, A, D)."""
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if lengths is None:
        attended: tuple[Any, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **more
        )
        return attended
    examples = zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True)
    parts = [_inside(q, k, v, sliding_window, dropout, scaling) for q, k, v in examples]
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1), None


def _inside(
    query: Any, key: Any, value: Any, window: int | None, dropout: float, scaling: float | None
) -> Any:
    """Causal attention inside an example: queries (1, A, S, D), keys and values (1, K, S, D)."""
    import torch

    tokens = query.shape[2]
    mask = None
    if window is not None and tokens > window:
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
        mask = mask.triu(1 - window)  # a token sees itself and those before it, `window` in all
    groups = query.shape[1] // key.shape[1]
    shares = groups > 1 and mask is None and _shares_heads(query)
    if groups > 1 and not shares:
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=shares,
    )


def _shares_heads(query: Any) -> bool:
    """Whether a fast kernel lets several heads of queries read one of keys, without a mask.

    Of CUDA's only flash attention does; without it PyTorch would write all scores to memory
    (sdp_utils.cpp).
    """
    import torch

    if query.device.type != "cuda":
        return True
    has_flash = torch.cuda.get_device_capability(query.device) >= (8, 0)
    return has_flash and query.element_size() == 2 and query.shape[-1] <= 256
