"""Cache keys: the content of a model's or adapter's configuration."""

from __future__ import annotations

from pathlib import Path

from hpcft.core.records import ModelSpec
from hpcft.methods.base import MethodBase


def model_config_content(model: ModelSpec) -> str:
    """The configuration file of a local model, which may change under the same path."""
    return _text(model.path, "config.json")


def adapter_config_content(method: MethodBase) -> str:
    """That of a local adapter, likewise."""
    return _text(method.adapter_folder, "adapter_config.json")


def _text(folder: str | None, name: str) -> str:
    file = Path(folder or "") / name
    return file.read_text() if folder and file.is_file() else ""
