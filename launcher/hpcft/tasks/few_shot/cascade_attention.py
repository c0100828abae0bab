"""Attention in two parts, over the shared prefix and within each row, merged by log-sum-exp.

Legend: B rows of S tokens, T = B·S, P tokens of the prefix, H heads of queries, K of keys and
values, G = H / K, D a head's dimension, C columns that a row can look at.

The rows of a batch lie one after the other in a single sequence of T tokens. So each layer reads
one copy of the prefix's keys and values, whatever the number of rows. The part over the prefix is
one plain attention of all G·T queries of a key head; the part within the rows is a small masked
one. Both give the logarithm of the sum that their softmax divided by, which is what it takes to
merge them: softmax over both = lerp(first, second, sigmoid(second's sum - first's sum)).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from hpcft.tasks.few_shot.attention_kernels import additive_mask, attend
from hpcft.tasks.few_shot.prefix_cache import Prefix

NAME = "hpcft_cascade"
PROMPT, PADDING = 0, -1  # branches of a row's tokens; those of its choices are 1, 2, ...


@dataclass
class RowMasks:
    """The batch that a forward runs, and what its tokens may look at."""

    prefix: Prefix
    """What the rows share."""

    depths: Tensor
    """Place of each token after the prefix, (B, S); choices of a row restart after its prompt."""

    branches: Tensor
    """Whose each token is, (B, S): the prompt's, a choice's, or padding."""

    deepest: int
    """The greatest of `depths`."""

    causal: bool
    """Whether the order of a row's tokens says what they see: nothing branches off, no padding
    comes before a token."""

    kept: dict[int, tuple[Tensor, Tensor]] | None = None
    """Keys and values of the rows' tokens so far, of each layer, if more tokens will follow."""

    columns: tuple[Tensor, Tensor] | None = None
    """Depths and branches of all tokens so far, (B, C), where some came in earlier forwards."""

    masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    """Masks built so far; the layers of one type share theirs."""

    def followed(self, depths: Tensor) -> RowMasks:
        """The same rows, one token further: its depth in each, (B, 1)."""
        before = self.columns or (self.depths, self.branches)
        branches = torch.full_like(depths, PROMPT)
        columns = torch.cat([before[0], depths], 1), torch.cat([before[1], branches], 1)
        return RowMasks(
            self.prefix, depths, branches, self.deepest + 1, False, self.kept, columns
        )  # fmt: skip

    def within(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """What each token adds to the scores of its own row, (B, 1, S, C); None: causal order."""
        reach = self.deepest + 1 if window is None else window
        if self.causal and self.deepest < reach:
            return None
        key = ("within", window, dtype)
        if key not in self.masks:
            depths, branches = self.columns or (self.depths, self.branches)
            back = self.depths[:, :, None] - depths[:, None, :]
            theirs, own = branches[:, None, :], self.branches[:, :, None]
            seen = (back >= 0) & (back < reach) & ((theirs == PROMPT) | (theirs == own))
            self.masks[key] = additive_mask(seen[:, None], dtype)
        return self.masks[key]

    def over(
        self, shared: int, groups: int, window: int | None, dtype: torch.dtype
    ) -> Tensor | None:
        """What G·T queries add to the scores of the prefix's last `shared`, (1, 1, G·T, P)."""
        if window is None or self.deepest + shared < window:
            return None
        key = ("over", shared, groups, window, dtype)
        if key not in self.masks:
            place = torch.arange(-shared, 0, device=self.depths.device)
            seen = self.depths.view(-1, 1) - place < window
            self.masks[key] = additive_mask(seen.repeat(groups, 1)[None, None], dtype)
        return self.masks[key]


def cascade(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    rows: RowMasks,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """One layer's attention of all rows: (1, H, T, D) in, (1, T, H, D) out.

    transformers calls it in place of its own attention; `rows` is what the model was called with.
    """
    look = partial(attend, scale=scaling, softcap=softcap)
    layer, groups = module.layer_idx, query.shape[1] // key.shape[1]
    own, own_sum = _within(query, key, value, rows, layer, sliding_window, look)
    if rows.prefix.length:
        keys, values = rows.prefix.layers[layer]
        mask = rows.over(keys.shape[2], groups, sliding_window, query.dtype)
        folded = query.reshape(1, -1, groups * query.shape[2], query.shape[3])
        shared, shared_sum = look(folded, keys, values, mask=mask, causal=False)
        share = torch.sigmoid(own_sum - shared_sum.reshape(own_sum.shape)).to(own.dtype)
        own = torch.lerp(shared.reshape(own.shape), own, share[..., None])
    return own.transpose(1, 2).contiguous(), None


def _within(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: RowMasks,
    layer: int,
    window: int | None,
    look: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """The part over each token's own row: (1, H, T, D), and its sums, (1, H, T)."""
    count, width = rows.depths.shape
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]

    def by_row(states: Tensor) -> Tensor:  # (1, H, T, D) to (B, H, S, D)
        return states.view(states.shape[1], count, width, -1).transpose(0, 1)

    query, key, value = by_row(query), by_row(key), by_row(value)
    if rows.kept is not None:
        if layer in rows.kept:
            earlier = rows.kept[layer]
            key, value = torch.cat([earlier[0], key], 2), torch.cat([earlier[1], value], 2)
        rows.kept[layer] = key, value
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    mask = rows.within(window, query.dtype)
    own, own_sum = look(query, key, value, mask=mask, causal=mask is None)
    own = own.transpose(0, 1).reshape(1, heads, count * width, -1)
    return own, own_sum.transpose(0, 1).reshape(1, heads, count * width)


AttentionInterface.register(NAME, cascade)


@contextmanager
def attending(model: Any) -> Iterator[None]:
    """Let a transformers model use this attention for as long as the block runs."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
