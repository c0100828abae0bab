"""Attention that tells, beside its result, the logarithm of what each softmax divided by.

Legend: B sequences, H heads, S queries, C keys, D a head's dimension.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def additive_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to scores.

    Finite, so that a row of nothing but masked keys has a sum too; its rows aligned to 16 numbers,
    as CUDA's kernels want them.
    """
    *shape, columns = seen.shape
    mask = torch.zeros((*shape, columns + -columns % 16), dtype=dtype, device=seen.device)
    return mask[..., :columns].masked_fill_(~seen, torch.finfo(dtype).min)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention of queries to keys, and the logarithm of what each softmax divided by, in fp32."""
    kind = query.device.type
    if softcap is None and kind == "cpu":
        out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=mask, scale=scale
        )
        return out, total
    if softcap is None and (kind == "meta" or _fits(query.device, query.dtype, query.shape[3])):
        return _efficient(query, key, value, mask, causal, scale)
    return eager(query, key, value, mask, causal, scale, softcap)


def _efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """CUDA's memory-efficient kernel: of those that give the sum, the one that takes a mask."""
    if mask is not None:
        mask = mask.expand(*query.shape[:3], key.shape[2])
    out, total, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, True, 0.0, causal, scale=scale
    )
    return out, total[:, :, : query.shape[2]]  # the kernel pads the sums


@cache
def _fits(device: torch.device, dtype: torch.dtype, head: int) -> bool:
    """Whether this device's kernel serves such heads and gives the sums that are meant."""
    if device.type != "cuda":
        return False
    query, key, value = torch.randn(3, 2, 2, 37, head, device=device).to(dtype)
    seen = torch.rand(2, 1, 37, 37, device=device) < 0.5
    seen[..., 0] = True
    mask = additive_mask(seen, dtype)
    near = 1e-3 if dtype == torch.float32 else 0.05
    for bias, causal in ((None, False), (None, True), (mask, False)):
        plain = eager(query, key, value, bias, causal, None, None)
        try:
            found = _efficient(query, key, value, bias, causal, None)
        except RuntimeError:
            return False
        pairs = zip(found, plain, strict=True)
        if not all(torch.allclose(a.float(), b.float(), near, near) for a, b in pairs):
            return False
    return True


def eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """The same in plain operations: for a soft cap, and where no kernel gives the sums."""
    scores = (query @ key.transpose(2, 3)).float().mul_(scale or query.shape[3] ** -0.5)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if causal:
        seen = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
        mask = additive_mask(seen, scores.dtype)
    if mask is not None:
        scores += mask
    total = scores.logsumexp(3)
    return scores.sub_(total[..., None]).exp_().to(value.dtype) @ value, total
