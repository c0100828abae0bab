"""Computes attention and, beside its result, the logarithm of each softmax's divisor.

Legend: B sequences, H heads, S queries, C keys, D a head's dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass
class AttentionInputs:
    """Holds the arguments of one scaled dot-product attention."""

    query: Tensor
    """Queries, (B, H, S, D)."""
    key: Tensor
    """Keys, (B, H, C, D)."""
    value: Tensor
    """Values, (B, H, C, D)."""
    mask: Tensor | None = None
    """Numbers to add to the scores, broadcastable to (B, H, S, C); see `additive_mask`."""
    is_causal: bool = False
    """Whether a query sees only keys up to its own place; then without `mask`."""
    scale: float | None = None
    """Factor of the scores; None: 1 / √D."""
    soft_cap: float | None = None
    """Bound of the scores: cap · tanh(score / cap)."""


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Makes a mask to add to scores, from the places that are visible.

    Its values are finite, so that a row whose keys are all masked has a sum too. Its rows are
    aligned to 16 numbers, as CUDA's kernels need them.
    """
    *shape, columns = visible.shape
    mask = torch.zeros((*shape, columns + -columns % 16), dtype=dtype, device=visible.device)
    return mask[..., :columns].masked_fill_(~visible, torch.finfo(dtype).min)


def attend(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Computes attention with the fastest kernel that serves the inputs.

    Returns:
        Outputs (B, H, S, D), and log-sum-exp of each query's scores (B, H, S) in fp32.
    """
    query = inputs.query
    if inputs.soft_cap is None:
        if query.device.type == "cpu":
            out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query,
                inputs.key,
                inputs.value,
                0.0,
                inputs.is_causal,
                attn_mask=inputs.mask,
                scale=inputs.scale,
            )
            return out, log_sum
        if query.device.type == "meta" or _kernel_is_right(
            query.device, query.dtype, query.shape[3]
        ):
            return _memory_efficient_attention(inputs)
    return eager_attention(inputs)


def _memory_efficient_attention(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Runs CUDA's memory-efficient kernel, the only one that gives the sums and takes a mask."""
    query, key, mask = inputs.query, inputs.key, inputs.mask
    if mask is not None:
        mask = mask.expand(*query.shape[:3], key.shape[2])
    out, log_sum, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, inputs.value, mask, True, 0.0, inputs.is_causal, scale=inputs.scale
    )
    return out, log_sum[:, :, : query.shape[2]]  # the kernel pads the sums


@cache
def _kernel_is_right(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Returns whether this device's kernel takes such heads and gives the sums that are meant."""
    if device.type != "cuda":
        return False
    query, key, value = torch.randn(3, 2, 2, 37, head_dim, device=device).to(dtype)
    visible = torch.rand(2, 1, 37, 37, device=device) < 0.5
    visible[..., 0] = True
    mask = additive_mask(visible, dtype)
    tolerance = 1e-3 if dtype == torch.float32 else 0.05
    for inputs in (
        AttentionInputs(query, key, value),
        AttentionInputs(query, key, value, is_causal=True),
        AttentionInputs(query, key, value, mask),
    ):
        expected = eager_attention(inputs)
        try:
            results = _memory_efficient_attention(inputs)
        except RuntimeError:
            return False
        pairs = zip(results, expected, strict=True)
        if not all(torch.allclose(a.float(), b.float(), tolerance, tolerance) for a, b in pairs):
            return False
    return True


def eager_attention(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Computes the same as `attend` in plain operations.

    It serves soft caps, and devices without a kernel that gives the sums.
    """
    query, key, value, mask = inputs.query, inputs.key, inputs.value, inputs.mask
    scores = (query @ key.transpose(2, 3)).float().mul_(inputs.scale or query.shape[3] ** -0.5)
    if inputs.soft_cap is not None:
        scores.div_(inputs.soft_cap).tanh_().mul_(inputs.soft_cap)
    if inputs.is_causal:
        visible = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
        mask = additive_mask(visible, scores.dtype)
    if mask is not None:
        scores += mask
    log_sum = scores.logsumexp(3)
    return scores.sub_(log_sum[..., None]).exp_().to(value.dtype) @ value, log_sum
