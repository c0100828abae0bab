"""The points of a sweep: what each of its runs changes in the recipe."""

from __future__ import annotations

import itertools
from typing import Any

from pydantic import JsonValue

from hpcft.config.yaml_document import DOTTED_KEY, Document, Loc, Origin
from hpcft.core.errors import InputError, Problem
from hpcft.core.records import Sweep

MAX_POINTS = 5000


def origin_of_values(doc: Document, key: str) -> Origin:
    """Where the values of a swept field were written."""
    repeats: list[Loc] = [("sweep", "seeds")] if key == "train.seed" else []
    axes = [("sweep", "grid", key), ("sweep", "zip", key), *repeats, ("sweep", "list")]
    return doc.origin_of(next((loc for loc in axes if loc in doc.origins), ("sweep",)))


def expand_points(sweep: Sweep, doc: Document) -> list[dict[str, JsonValue]]:
    """What each run of a sweep changes: dotted field to value.

    Raises:
        InputError: there are too many, or its lists do not go together.
    """
    where = str(doc.origin_of(("sweep",)))
    axes: list[list[dict[str, JsonValue]]] = [
        [{key: value} for value in values] for key, values in sweep.grid.items()
    ]
    if sweep.zip:
        if len({len(values) for values in sweep.zip.values()}) > 1:
            sizes = ", ".join(f"{key}: {len(values)}" for key, values in sweep.zip.items())
            raise InputError(
                [Problem(where, "sweep.zip", f"expected lists of equal length, got {sizes}")]
            )
        rows = zip(*sweep.zip.values(), strict=True)
        axes.append([dict(zip(sweep.zip, row, strict=True)) for row in rows])
    if sweep.list:
        axes.append(list(sweep.list))
    if sweep.seeds:
        axes.append([{"train.seed": seed} for seed in sweep.seeds])
    count = 1
    for axis in axes:
        count *= len(axis)
    if not axes or not 0 < count <= MAX_POINTS:
        raise InputError(
            [
                Problem(
                    where, "sweep", f"expected 1 to {MAX_POINTS} points, got {count if axes else 0}"
                )
            ]
        )
    found = [
        {k: v for part in parts for k, v in part.items()} for parts in itertools.product(*axes)
    ]
    for key in {key for point in found for key in point}:
        if not DOTTED_KEY.fullmatch(key) or key.split(".")[0] == "sweep":
            what = "expected a dotted field of the recipe"
            raise InputError([Problem(str(origin_of_values(doc, key)), f"sweep: {key}", what)])
    return found


def format_point(values: dict[str, Any]) -> str:
    """The swept values of a run in a line: `learning_rate=1e-4 seed=2`."""
    return " ".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in values.items())
