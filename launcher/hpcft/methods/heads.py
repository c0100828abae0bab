"""The task's head on a model: which modules it is, and what PEFT calls its task."""

from __future__ import annotations

from typing import Any


def head_modules(model: Any) -> list[str]:
    """Names of the modules that a task adds beside the base model, from the outermost.

    RoBERTa's `classifier` is one (with its `dense`), DistilBERT has two (`pre_classifier` and
    `classifier`). The output layer of a language model is none: it is pretrained with the rest.
    """
    output = model.get_output_embeddings()
    if output is not None:
        return []
    return [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]


def task_type(model: Any, *, causal: bool) -> Any:
    """PEFT's task type, by which an adapter is loaded back.

    Raises:
        ValueError: the model is neither a classifier, nor a span finder, nor causal.
    """
    from peft import TaskType

    if causal:
        return TaskType.CAUSAL_LM
    heads = head_modules(model)
    if not heads:
        raise ValueError(f"{type(model).__name__} has no head beside it: train it in full")
    return TaskType.QUESTION_ANS if "qa_outputs" in heads else TaskType.SEQ_CLS


def train_in_fp32(model: Any) -> None:
    """Makes what is trained fp32 (the rest may be 16-bit), as PEFT does for LoRA's updates.

    An optimizer's small steps are lost in 16 bits. DeepSpeed casts back and keeps its own copy.
    """
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32)
