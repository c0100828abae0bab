"""Cache keys: the content of a model's or adapter's configuration file."""

from __future__ import annotations

from pathlib import Path

from hpcft.core.records import ModelSpec
from hpcft.methods.base import MethodBase


def model_config_content(model: ModelSpec) -> str:
    """Returns the text of a local model's `config.json`, which may change under the same path.

    It is empty for a model of the hub and for a new model.
    """
    return _read_text(model.path, "config.json")


def adapter_config_content(method: MethodBase) -> str:
    """Returns the text of a local adapter's `adapter_config.json`; empty if there is none."""
    return _read_text(method.adapter_folder, "adapter_config.json")


def _read_text(folder: str | None, name: str) -> str:
    file = Path(folder or "") / name
    return file.read_text(encoding="utf-8") if folder and file.is_file() else ""
