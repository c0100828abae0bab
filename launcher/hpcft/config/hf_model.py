"""Builds the Hugging Face configuration and model class that a recipe names."""

from __future__ import annotations

import difflib
from typing import Any

from hpcft.core.errors import DataError
from hpcft.core.records import ModelSpec
from hpcft.tasks.base import TaskBase


class ModelConfigError(DataError):
    """A field of `model.config` that the model type does not have, or with a wrong value."""

    def __init__(self, key: str, what: str, fix: str) -> None:
        super().__init__(f"model.config.{key}: {what}; {fix}")
        self.key, self.what, self.fix = key, what, fix


def build_model_config(model: ModelSpec, task: TaskBase, *, to_plan: bool = False) -> Any:
    """Returns the `transformers` configuration of the model with the task's head.

    Args:
        model: with a `path`, the configuration is read there; a new model has `config` alone.
        task: the task, which has a head.
        to_plan: whether a hub model's described `config` is used instead, which needs no network.
            A run must not do so: fields that are not described would be defaults.

    Raises:
        ModelConfigError: `config` has a field that the model type does not have.
        DataError: there is no configuration, or `transformers` does not know it.
    """
    from transformers import AutoConfig

    head = dict(task.head().config)
    described = dict(model.config or {})
    is_local = model.path is not None and model.path.startswith("/")
    try:
        if model.path and (is_local or not (described and to_plan)):
            return AutoConfig.from_pretrained(
                model.path, revision=model.revision, trust_remote_code=False, **head
            )
        config = AutoConfig.for_model(str(described.pop("model_type")), **described)
        config.update(head)
    except Exception as error:  # the recipe's fields go into a model's class, which raises anything
        raise DataError(
            f"model: no usable configuration of {model.path or described}: "
            f"{library_error_text(error)}\n"
            "  use a local folder, or describe the architecture in model.config"
        ) from None
    _check_described(described, config)
    return config


def _check_described(described: dict[str, Any], config: Any) -> None:
    """Checks the described fields against the model type; `transformers` ignores unknown ones.

    Raises:
        ModelConfigError: the model type has no such field, or a dimension is not positive.
    """
    known = {*type(config)().to_dict(), *config.attribute_map, "rope_theta", "rope_scaling"}
    for key, value in described.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
            fix = f"did you mean {' or '.join(near)}?" if near else "leave it out"
            raise ModelConfigError(key, f"unknown key of a {config.model_type} model", fix)
        is_dimension = key.startswith(("num_", "n_")) or key.endswith(("_size", "dim"))
        if is_dimension and isinstance(value, int) and value <= 0:
            raise ModelConfigError(key, f"expected a positive number, got {value}", "correct it")


def auto_model_class(task: TaskBase) -> Any:
    """Returns the `transformers` Auto class of the task's head."""
    import transformers

    return getattr(transformers, task.head().auto_class)


def library_error_text(error: Exception) -> str:
    """Returns the text of a library's error in one line of at most 300 characters."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {text}"
