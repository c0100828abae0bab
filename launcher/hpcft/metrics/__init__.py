"""Metric modules, loaded by path through `evaluate`, so that they work without network."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def classification_names(labels: list[str]) -> list[str]:
    """What `metrics/classification` gives for these labels."""
    names = ["accuracy", "precision", "recall", "f1", "f1_macro", "majority"]
    return [*names, *(f"recall[{label}]" for label in labels)]


def squad_names(*, no_answers: bool) -> list[str]:
    """What `metrics/squad` gives, with or without questions that have no answer."""
    names = ["exact", "f1"]
    if no_answers:
        names += [f"{group}_{name}" for name in names[:2] for group in ("HasAns", "NoAns", "best")]
        names += [f"best_{name}_thresh" for name in names[:2]]
    return names


def compute(name: str, **inputs: Any) -> dict[str, float]:
    """The values of a metric module of this folder, on the scale that its description states."""
    import evaluate

    module = evaluate.load(str(Path(__file__).parent / name), keep_in_memory=True)
    result = module.compute(**inputs)
    assert result is not None
    return {key: float(value) for key, value in result.items()}
