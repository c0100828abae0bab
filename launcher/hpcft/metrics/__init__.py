"""Metric modules, loaded by path through `evaluate`, so that they work without network.

`facts.FACTS` says of every metric its scale and direction.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

Scores = dict[str, Any]
"""Metric to value; with it, where known, `intervals` (metric to lowest and highest likely value)
and `confusion` (`labels`, and `counts` by true and given label)."""
DETAILS = ("intervals", "confusion")


def classification_names(labels: list[str]) -> list[str]:
    """What `metrics/classification` gives for these labels."""
    each = ("precision", "recall", "f1")
    names = ["accuracy", *each, "f1_macro", "f1_micro", "matthews", "majority"]
    return [*names, *(f"{name}[{label}]" for name in each for label in labels)]


def squad_names(*, no_answers: bool) -> list[str]:
    """What `metrics/squad` gives, with or without questions that have no answer."""
    names = ["exact", "f1"]
    if no_answers:
        names += [f"{group}_{name}" for name in names[:2] for group in ("HasAns", "NoAns", "best")]
        names += [f"best_{name}_thresh" for name in names[:2]]
    return names


def overlap_names() -> list[str]:
    """What `metrics/text_overlap` gives."""
    return ["bleu", "rouge1", "rouge2", "rougeL", "meteor"]


def compute_metric(name: str, **inputs: Any) -> Scores:
    """The values of a metric module of this folder, on the scale that its description states."""
    import evaluate

    module = evaluate.load(str(Path(__file__).parent / name), keep_in_memory=True)
    result = module.compute(**inputs)
    assert result is not None
    return {key: v if key in DETAILS else float(v) for key, v in result.items()}


def merge_scores(*parts: Scores) -> Scores:
    """The scores of several modules in one."""
    intervals = {name: v for part in parts for name, v in part.get("intervals", {}).items()}
    return {k: v for part in parts for k, v in part.items()} | {"intervals": intervals}


def metric_values(scores: Scores) -> dict[str, float]:
    """The metrics alone."""
    return {name: value for name, value in scores.items() if name not in DETAILS}
