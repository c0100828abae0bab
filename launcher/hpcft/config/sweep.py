"""Expands a sweep into its points: the fields that each of its runs changes in the recipe."""

from __future__ import annotations

import itertools
from typing import Any

from pydantic import JsonValue

from hpcft.config.yaml_document import DOTTED_KEY, Document, Loc, Origin
from hpcft.core.errors import Problems
from hpcft.core.records import Sweep

MAX_POINTS = 5000


def origin_of_values(doc: Document, key: str) -> Origin:
    """Returns where the values of a swept field were written."""
    seeds: list[Loc] = [("sweep", "seeds")] if key == "train.seed" else []
    axes = [("sweep", "grid", key), ("sweep", "zip", key), *seeds, ("sweep", "list")]
    return doc.origin_of(next((loc for loc in axes if loc in doc.origins), ("sweep",)))


def expand_points(sweep: Sweep, doc: Document) -> list[dict[str, JsonValue]]:
    """Returns the points of a sweep, each as dotted field to value.

    Args:
        sweep: the record.
        doc: the document that it was read from.

    Raises:
        InputError: there are none or too many, lists differ in length, or a key is not a field.
    """
    problems = Problems(doc.location_of)
    if len({len(values) for values in sweep.zip.values()}) > 1:
        lengths = ", ".join(f"{key}: {len(values)}" for key, values in sweep.zip.items())
        fix = "give each field as many values as the others, or use sweep.grid"
        problems.add("sweep.zip", expected="lists of equal length", got=lengths, fix=fix)
        problems.raise_if_any()
    axes = _axes(sweep)
    count = 1 if axes else 0
    for axis in axes:
        count *= len(axis)
    if not 0 < count <= MAX_POINTS:
        fix = "give values in sweep.grid, zip, list or seeds" if count == 0 else "use fewer values"
        problems.add("sweep", expected=f"1 to {MAX_POINTS} points", got=count, fix=fix)
        problems.raise_if_any()
    points = [
        {k: v for part in parts for k, v in part.items()} for parts in itertools.product(*axes)
    ]
    problems = Problems(lambda key: str(origin_of_values(doc, key)))
    for key in dict.fromkeys(key for point in points for key in point):
        if not DOTTED_KEY.fullmatch(key) or key.split(".")[0] == "sweep":
            expected = "a field of the recipe other than sweep, such as train.learning_rate"
            problems.add(key, expected=expected, got=repr(key))
    problems.raise_if_any()
    return points


def _axes(sweep: Sweep) -> list[list[dict[str, JsonValue]]]:
    """Returns the parts of a sweep that multiply each other, each as a list of changes."""
    axes: list[list[dict[str, JsonValue]]] = [
        [{key: value} for value in values] for key, values in sweep.grid.items()
    ]
    if sweep.zip:
        rows = zip(*sweep.zip.values(), strict=True)
        axes.append([dict(zip(sweep.zip, row, strict=True)) for row in rows])
    if sweep.list:
        axes.append(list(sweep.list))
    if sweep.seeds:
        axes.append([{"train.seed": seed} for seed in sweep.seeds])
    return axes


def format_point(values: dict[str, Any]) -> str:
    """Formats the swept values of a run in a line: `learning_rate=1e-4 seed=2`."""
    return " ".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in values.items())
