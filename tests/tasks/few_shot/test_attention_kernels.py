"""Compares the attention kernels with plain operations."""

from __future__ import annotations

import pytest
import torch

from hpcft.tasks.few_shot.attention_kernels import (
    AttentionInputs,
    additive_mask,
    attend,
    eager_attention,
)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("is_masked", [False, True])
def test_attend_equals_eager_attention(is_causal: bool, is_masked: bool) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 13, 16)
    visible = torch.rand(2, 1, 13, 13) < 0.7
    mask = additive_mask(visible, torch.float32) if is_masked and not is_causal else None
    inputs = AttentionInputs(query, key, value, mask, is_causal=is_causal, scale=0.3)
    for a, b in zip(attend(inputs), eager_attention(inputs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
