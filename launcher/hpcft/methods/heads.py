"""Finds the modules of a task's head on a model, and PEFT's name for the task."""

from __future__ import annotations

from typing import Any


def head_modules(model: Any) -> list[str]:
    """Returns the names of the top-level modules that a task adds to the base model.

    RoBERTa has one (`classifier`, with its `dense`), DistilBERT two (`pre_classifier` and
    `classifier`). The output layer of a language model is none: it is pretrained with the rest.
    """
    if model.get_output_embeddings() is not None:
        return []
    return [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]


def task_type(model: Any, *, causal: bool) -> Any:
    """Returns PEFT's task type, which decides the class that an adapter is loaded into.

    Raises:
        ValueError: the model neither classifies, nor finds answer spans, nor is causal.
    """
    from peft import TaskType

    if causal:
        return TaskType.CAUSAL_LM
    heads = head_modules(model)
    if not heads:
        raise ValueError(
            f"{type(model).__name__} has no head beside the pretrained model; use method full"
        )
    # ModernBERT's layer for answer spans is called `classifier`, too.
    finds_spans = "ForQuestionAnswering" in type(model).__name__
    return TaskType.QUESTION_ANS if finds_spans else TaskType.SEQ_CLS


def train_in_fp32(model: Any) -> None:
    """Casts the trained parameters to fp32, as PEFT does for LoRA's updates.

    In 16 bits the optimizer's small steps would be lost. DeepSpeed casts the parameters back and
    keeps its own fp32 copy.
    """
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32)
