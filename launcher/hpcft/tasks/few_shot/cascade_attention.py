"""Computes attention over the shared prefix and within each row, and merges the two.

Legend: B rows of S tokens, T = B·S, P tokens of the prefix, H heads of queries, K of keys and
values, G = H / K, D a head's dimension, C columns that a row can look at.

The rows of a batch lie one after the other in a single sequence of T tokens. So each layer reads
one copy of the prefix's keys and values, whatever the number of rows. The part over the prefix is
one plain attention of all G·T queries of a key head; the part within the rows is a small masked
one. Both give the log-sum-exp of their scores, by which they are merged: softmax over both =
lerp(prefix part, row part, sigmoid(row part's log-sum-exp - prefix part's log-sum-exp)).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from hpcft.tasks.few_shot.attention_kernels import AttentionInputs, additive_mask, attend
from hpcft.tasks.few_shot.prefix_cache import Prefix

ATTENTION = "hpcft_cascade"
PROMPT, PADDING = 0, -1  # branches of a row's tokens; those of its choices are 1, 2, ...


@dataclass
class RowMasks:
    """Describes the rows of a forward pass, and makes the masks of what their tokens see."""

    prefix: Prefix
    """Prefix that the rows share."""

    depths: Tensor
    """Place of each token after the prefix, (B, S); every choice starts where the prompt ends."""

    branches: Tensor
    """Branch of each token, (B, S): that of the prompt, of a choice, or of padding."""

    max_depth: int
    """Largest of `depths`."""

    is_causal: bool
    """Whether a row's tokens see all tokens before them: nothing branches off, and no padding comes
    before a token."""

    row_cache: dict[int, tuple[Tensor, Tensor]] | None = None
    """Keys and values of the rows' tokens so far, of each layer; None if no more tokens follow."""

    columns: tuple[Tensor, Tensor] | None = None
    """Depths and branches of all tokens so far, (B, C), if earlier forward passes had some."""

    masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    """Masks made so far, which layers of one type share."""

    def next_token_rows(self, depths: Tensor) -> RowMasks:
        """Returns the same rows for one more token each, at these depths (B, 1)."""
        earlier = self.columns or (self.depths, self.branches)
        branches = torch.full_like(depths, PROMPT)
        return RowMasks(
            self.prefix,
            depths,
            branches,
            max_depth=self.max_depth + 1,
            is_causal=False,
            row_cache=self.row_cache,
            columns=(torch.cat([earlier[0], depths], 1), torch.cat([earlier[1], branches], 1)),
        )

    def row_mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Returns the mask of tokens over their own row, (B, 1, S, C); None: causal order."""
        reach = self.max_depth + 1 if window is None else window
        if self.is_causal and self.max_depth < reach:
            return None
        cache_key = ("row", window, dtype)
        if cache_key not in self.masks:
            depths, branches = self.columns or (self.depths, self.branches)
            distance = self.depths[:, :, None] - depths[:, None, :]
            key_branches, own_branches = branches[:, None, :], self.branches[:, :, None]
            is_reached = (distance >= 0) & (distance < reach)
            visible = is_reached & ((key_branches == PROMPT) | (key_branches == own_branches))
            self.masks[cache_key] = additive_mask(visible[:, None], dtype)
        return self.masks[cache_key]

    def prefix_mask(
        self, shared: int, groups: int, window: int | None, dtype: torch.dtype
    ) -> Tensor | None:
        """Returns the mask of G·T queries over the prefix, (1, 1, G·T, P); None: all is visible.

        Args:
            shared: number of the prefix's last tokens whose keys the layer holds, P.
            groups: query heads for each key head, G.
            window: tokens that a query sees, its own included; None: all before it.
            dtype: type of the scores.
        """
        if window is None or self.max_depth + shared < window:
            return None
        cache_key = ("prefix", shared, groups, window, dtype)
        if cache_key not in self.masks:
            place = torch.arange(-shared, 0, device=self.depths.device)
            visible = self.depths.view(-1, 1) - place < window
            self.masks[cache_key] = additive_mask(visible.repeat(groups, 1)[None, None], dtype)
        return self.masks[cache_key]


def cascade_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    row_masks: RowMasks,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Computes one layer's attention of all rows: (1, H, T, D) in, (1, T, H, D) out.

    transformers calls it in place of its own attention; `row_masks` is an argument that the model
    was called with.
    """
    layer, groups = module.layer_idx, query.shape[1] // key.shape[1]
    inputs = AttentionInputs(query, key, value, scale=scaling, soft_cap=softcap)
    out, log_sum = _row_attention(inputs, row_masks, layer, sliding_window)
    if row_masks.prefix.length:
        keys, values = row_masks.prefix.layers[layer]
        mask = row_masks.prefix_mask(keys.shape[2], groups, sliding_window, query.dtype)
        folded = query.reshape(1, -1, groups * query.shape[2], query.shape[3])
        over_prefix = AttentionInputs(folded, keys, values, mask, scale=scaling, soft_cap=softcap)
        prefix_out, prefix_log_sum = attend(over_prefix)
        share = torch.sigmoid(log_sum - prefix_log_sum.reshape(log_sum.shape)).to(out.dtype)
        out = torch.lerp(prefix_out.reshape(out.shape), out, share[..., None])
    return out.transpose(1, 2).contiguous(), None


def _row_attention(
    inputs: AttentionInputs, row_masks: RowMasks, layer: int, window: int | None
) -> tuple[Tensor, Tensor]:
    """Computes the part over each token's own row: (1, H, T, D), and its sums, (1, H, T)."""
    rows, width = row_masks.depths.shape
    heads, groups = inputs.query.shape[1], inputs.query.shape[1] // inputs.key.shape[1]

    def by_row(states: Tensor) -> Tensor:  # (1, H, T, D) to (B, H, S, D)
        return states.view(states.shape[1], rows, width, -1).transpose(0, 1)

    query, key, value = by_row(inputs.query), by_row(inputs.key), by_row(inputs.value)
    if row_masks.row_cache is not None:
        if layer in row_masks.row_cache:
            earlier_key, earlier_value = row_masks.row_cache[layer]
            key = torch.cat([earlier_key, key], 2)
            value = torch.cat([earlier_value, value], 2)
        row_masks.row_cache[layer] = key, value
    mask = row_masks.row_mask(window, query.dtype)
    out, log_sum = attend(
        replace(
            inputs,
            query=query,
            key=key.repeat_interleave(groups, 1),
            value=value.repeat_interleave(groups, 1),
            mask=mask,
            is_causal=mask is None,
        )
    )
    out = out.transpose(0, 1).reshape(1, heads, rows * width, -1)
    return out, log_sum.transpose(0, 1).reshape(1, heads, rows * width)


AttentionInterface.register(ATTENTION, cascade_attention_forward)


@contextmanager
def use_cascade_attention(model: Any) -> Iterator[None]:
    """Makes a transformers model use this attention for as long as the block runs."""
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
