"""Tests of QLoRA against behaviour of bitsandbytes that would make training wrong."""

from __future__ import annotations

from pathlib import Path

import torch

from builders import llama_folder
from hpcft.methods.qlora import QLoRA


def test_wrap_4bit_model_keeps_gradients_after_evaluation(tmp_path: Path) -> None:
    """On some CPUs bitsandbytes repacks the weights when it evaluates; then no gradient passes."""
    from transformers import AutoModelForCausalLM

    method = QLoRA(name="qlora", r=4, target_modules="all-linear")
    model = AutoModelForCausalLM.from_pretrained(
        llama_folder(tmp_path / "base"), **method.load_options("fp32", 0)
    )
    linear = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    for module in linear:
        module.support_avx512bf16_for_cpu = True  # as on a CPU that has AVX512-BF16
    model = method.wrap(model, causal=True, checkpointing=False)
    ids = torch.tensor([[1, 5, 9, 13]])

    def gradients() -> list[torch.Tensor]:
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = gradients()
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    after = gradients()
    assert len(linear) == 14
    assert any(g.abs().sum() > 0 for g in before)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
