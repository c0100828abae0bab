"""Builds models on PyTorch's meta device, without weights."""

from __future__ import annotations

from typing import Any

from hpcft.config.hf_model import _reason, auto_model_class, build_model_config
from hpcft.core.errors import DataError
from hpcft.core.records import ModelSpec
from hpcft.methods import AnyMethod
from hpcft.tasks.base import TaskBase


def build_on_meta(model: ModelSpec, task: TaskBase) -> Any:
    """The model with the task's head on the meta device: shapes without weights.

    Raises:
        DataError: there is no such model, or it has no such head.
    """
    import torch

    config = build_model_config(model, task, to_plan=True)
    head = task.head()
    try:
        with torch.device("meta"):
            bare = auto_model_class(task).from_config(config, dtype=torch.float32)
        if head.module:
            bare.get_submodule(head.module)
    except Exception as error:  # as above
        raise DataError(
            f"model: {config.model_type} makes no {head.auto_class}: {_reason(error)}"
        ) from None
    return bare


def apply_method(bare: Any, task: TaskBase, method: AnyMethod) -> Any:
    """The model as the method trains it.

    Raises:
        DataError: the method cannot train such a model.
    """
    try:
        return method.wrap(bare, causal=task.causal, checkpointing=False)
    except (ValueError, TypeError) as error:
        raise DataError(f"method.{method.name}: {_reason(error)}") from None
