"""Metric modules, loaded by path through `evaluate`, so that they work without network."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def classification_names(labels: list[str]) -> list[str]:
    """What `metrics/classification` gives for these labels."""
    names = ["accuracy", "precision", "recall", "f1", "f1_macro", "majority"]
    return [*names, *(f"recall[{label}]" for label in labels)]


def compute(name: str, **inputs: Any) -> dict[str, float]:
    """The values of a metric module of this folder, on the scale that its description states."""
    import evaluate

    module = evaluate.load(str(Path(__file__).parent / name), keep_in_memory=True)
    labels = inputs.pop("labels", None)
    extra = {} if labels is None else {"labels": labels}
    result = module.compute(**inputs, **extra)
    assert result is not None
    return {key: float(value) for key, value in result.items()}
