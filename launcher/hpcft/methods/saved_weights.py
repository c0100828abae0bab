"""Compares the shapes of saved weights, read from the files' headers, with those of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpcft.core.errors import DataError
from hpcft.methods.heads import head_modules


def weight_shapes(folder: str, files: str = "*.safetensors") -> dict[str, list[int]]:
    """Returns the shapes of the weights in a folder's files; nothing for a hub name."""
    from safetensors import safe_open

    shapes: dict[str, list[int]] = {}
    for path in Path(folder).glob(files):
        with safe_open(path, "pt") as file:
            shapes |= {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def check_shapes(model: Any, folder: str) -> None:
    """Checks that a folder holds a model, and that its weights have the shapes that are needed.

    Weights that only one of them has are no fault: a new head, or one that is not used.

    Args:
        model: the model with the task's head, on the meta device.
        folder: the folder that its weights are loaded from.

    Raises:
        DataError: it holds an adapter, or a weight has another shape, for example a head for
            another number of labels.
    """
    if (Path(folder) / "adapter_config.json").is_file():
        raise DataError(
            f"model.path: {folder} holds an adapter; set model.path to its base model; to score "
            f"the adapter over it, set method: {{name: frozen, adapter_path: {folder}}}"
        )
    if getattr(model.config, "quantization_config", None):
        return  # Packed weights have shapes of their own.
    needed = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    saved = weight_shapes(folder, "model*.safetensors")
    wrong = sorted(name for name, shape in saved.items() if needed.get(name, shape) != shape)
    if not wrong:
        return
    heads = head_modules(model)
    # The last weight of a head has a row for each label.
    of_head = [name for name in wrong if name.partition(".")[0] in heads]
    name = of_head[-1] if of_head else wrong[0]
    what = f"{name} has the shape {saved[name]}, this recipe needs {needed[name]}"
    if not of_head:
        raise DataError(
            f"model.path: {folder}: {what}: its weights are not of the model that its config.json "
            "describes; save it again"
        )
    raise DataError(
        f"model.path: {folder} has a head for {saved[name][0]} labels, the task has "
        f"{needed[name][0]} ({what}); give task.labels the labels of that head, or save the model "
        f"without it: AutoModel.from_pretrained({folder!r}).save_pretrained(NEW_FOLDER)"
    )
