"""Builds models on PyTorch's meta device: shapes without weights."""

from __future__ import annotations

from typing import Any

from hpcft.config.hf_model import auto_model_class, build_model_config, library_error_text
from hpcft.core.errors import DataError
from hpcft.core.records import ModelSpec
from hpcft.methods import AnyMethod
from hpcft.tasks.base import TaskBase


def build_on_meta(model: ModelSpec, task: TaskBase) -> Any:
    """Returns the model with the task's head on the meta device, in fp32.

    Raises:
        DataError: `transformers` has no such model, or no such head for it.
    """
    import torch

    config = build_model_config(model, task, to_plan=True)
    head = task.head()
    try:
        with torch.device("meta"):
            bare = auto_model_class(task).from_config(config, dtype=torch.float32)
        if head.module:
            bare.get_submodule(head.module)
    except Exception as error:  # A model's code may raise anything.
        raise DataError(
            f"model: {config.model_type} has no {head.auto_class}: {library_error_text(error)}"
        ) from None
    return bare


def apply_method(bare: Any, task: TaskBase, method: AnyMethod) -> Any:
    """Returns the model as the method trains it, for example with adapters.

    Raises:
        DataError: the method cannot train this model.
    """
    try:
        return method.wrap(bare, causal=task.causal, checkpointing=False)
    except (ValueError, TypeError) as error:
        raise DataError(f"method.{method.name}: {library_error_text(error)}") from None
