"""Tests of QLoRA against behaviour of bitsandbytes that would make training wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from builders import bert_folder, layout, llama_folder, recipe, run_plan, worker_context
from hpcft.methods.heads import task_type
from hpcft.methods.qlora import QLoRA, four_bit_layers
from hpcft.training.trainer.model import load_model


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


SHAPE = {
    "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
HEADS = {
    "deberta-v2": ["pooler.dense", "classifier"],
    "modernbert": ["head.dense", "classifier"],
    "eurobert": ["dense", "classifier"],
    "roberta": ["classifier.dense", "classifier.out_proj"],
}


@pytest.mark.parametrize("kind", HEADS)
def test_no_layer_of_a_head_is_quantised_and_all_are_trained(kind: str, tmp_path: Path) -> None:
    """The weights in 4 bits are those that the plan counts, and the head's are not among them."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    bert_folder(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    config = AutoConfig.for_model(kind, num_labels=2, **SHAPE)
    bare = AutoModelForSequenceClassification.from_config(config)
    bare.save_pretrained(tmp_path / "base")
    made = recipe(
        model={"path": str(tmp_path / "base"), "attn_implementation": "eager"},
        method={"name": "qlora", "r": 2, "target_modules": "all-linear"},
    )
    plan = run_plan(layout=layout(0), precision="fp32", accelerator="cpu", ds_config=None)
    model = load_model(worker_context(tmp_path / "run", made, plan), tokenizer)
    base = model.get_base_model()
    held = {
        name.replace(".base_layer", "")
        for name, module in base.named_modules()
        if type(module).__name__ == "Linear4bit"
    }
    assert held == {*four_bit_layers(bare)}
    assert held, "the base is in 4 bits"
    linear = {name for name, module in bare.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linear - held == {*HEADS[kind]}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name in HEADS[kind]:
        first, _, rest = name.partition(".")
        parts = [first, "modules_to_save.default", *filter(None, [rest]), "weight"]
        assert f"base_model.model.{'.'.join(parts)}" in trained


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_task_type_of_a_model_for_answer_spans(kind: str) -> None:
    """ModernBERT's output layer has the name of a classifier's; PEFT would not load the adapter."""
    from peft import TaskType
    from transformers import AutoConfig, AutoModelForQuestionAnswering

    with torch.device("meta"):
        model = AutoModelForQuestionAnswering.from_config(AutoConfig.for_model(kind, **SHAPE))
    assert task_type(model, causal=False) == TaskType.QUESTION_ANS
