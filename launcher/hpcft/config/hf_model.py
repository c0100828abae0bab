"""Builds the Hugging Face configuration and model class that a recipe names."""

from __future__ import annotations

import difflib
from typing import Any

from hpcft.core.errors import DataError
from hpcft.core.records import ModelSpec
from hpcft.tasks.base import TaskBase


class BadConfig(DataError):
    """A field of `model.config` that no configuration of that model type has."""

    def __init__(self, key: str, what: str, fix: str) -> None:
        super().__init__(f"model.config.{key}: {what}; {fix}")
        self.key, self.what, self.fix = key, what, fix


def build_model_config(model: ModelSpec, task: TaskBase, *, to_plan: bool = False) -> Any:
    """The `transformers` configuration of the model with the task's head.

    Args:
        model: a model with a `path` has the configuration that is there, a new one `config`.
        task: whose head it is.
        to_plan: of a hub model the described `config` will do, which needs no network. A run
            never uses it: what it does not tell (activations, epsilons) would be defaults.

    Raises:
        DataError: there is none, or `transformers` does not know it.
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
    except Exception as error:  # a stranger's fields meet a stranger's class: anything is raised
        raise DataError(
            f"model: no usable configuration of {model.path or described}: {_reason(error)}\n"
            "  use a local folder, or describe the architecture in model.config"
        ) from None
    _check_described(described, config)
    return config


def _check_described(described: dict[str, Any], config: Any) -> None:
    """Refuses fields that the model type does not have, which `transformers` takes in silence."""
    known = {*type(config)().to_dict(), *config.attribute_map, "rope_theta", "rope_scaling"}
    for key, value in described.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
            fix = f"did you mean {' or '.join(near)}?" if near else "leave it out"
            raise BadConfig(key, f"unknown key of a {config.model_type} model", fix)
        is_dimension = key.startswith(("num_", "n_")) or key.endswith(("_size", "dim"))
        if is_dimension and isinstance(value, int) and value <= 0:
            raise BadConfig(key, f"expected a positive number, got {value}", "correct it")


def auto_model_class(task: TaskBase) -> Any:
    """The `transformers` Auto class of the task's head."""
    import transformers

    return getattr(transformers, task.head().auto_class)


def _reason(error: Exception) -> str:
    """What an error of a library says, in a line."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {text}"
