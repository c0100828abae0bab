"""Defines metric modules: their values, with scale and direction, and inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Scores = dict[str, Any]
"""Value of each metric by its name; with it, where known, `intervals` (lowest and highest likely
value by name) and `confusion` (`labels`, and `counts` by true and predicted label)."""

SHARE = "0 to 1"


@dataclass(frozen=True)
class MetricInfo:
    """Meaning, direction and scale of one value."""

    description: str
    """Meaning, in a line."""
    higher_is_better: bool | None = True
    """Direction; None for a value that is neither good nor bad and only there to compare with."""
    scale: str = SHARE
    """Lowest and highest possible value."""


@dataclass(frozen=True)
class Metric:
    """A metric module: what it needs, what it gives, and the function that computes it."""

    infos: Mapping[str, MetricInfo]
    """Every value that it can give, by name; `recall[]` stands for that of each label."""
    inputs: Mapping[str, Any]
    """Types of the inputs: names of `datasets` types, in a mapping or a list where inputs nest."""
    compute: Callable[..., Scores]
    """Computes the values of a split from the inputs, and from further keyword arguments."""
    citation: str = ""
    """Paper that defines the values."""


def merge_scores(*parts: Scores) -> Scores:
    """Merges the scores of several metric modules."""
    intervals = {name: v for part in parts for name, v in part.get("intervals", {}).items()}
    return {k: v for part in parts for k, v in part.items()} | {"intervals": intervals}
