"""Tells rows of results apart that have the same recipe name and the same swept values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpcft.config.recipe_types import FullRecipe

SHOWN_OTHERWISE = ("description", "baseline", "sweep", "train.seed")
"""Fields that do not tell rows apart, or that a row shows otherwise."""


def differences(
    runs: Sequence[tuple[str, str, FullRecipe | None]], known: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Returns for each row the values in which it differs from the others, by dotted field.

    Args:
        runs: of each row its run id, its cluster and its recipe; None if that cannot be read.
        known: dotted fields that the rows show already.
    """
    values = [
        {"cluster": cluster, **(_flat(recipe.model_dump(mode="json")) if recipe else {})}
        for _, cluster, recipe in runs
    ]
    fields = list(dict.fromkeys(field for row in values for field in row))
    hidden = (*SHOWN_OTHERWISE, *known)
    shown = [
        field
        for field in fields
        if not any(field == name or field.startswith(f"{name}.") for name in hidden)
        and any(row.get(field) != values[0].get(field) for row in values)
    ]
    # Options that only some rows have, such as those of a method, are shown where it takes them.
    of_all = [field for field in shown if all(field in row for row in values)]
    names = [{field: row[field] for field in of_all} for row in values]
    for field in (field for field in shown if field not in of_all):
        more = [
            {**name, **({field: row[field]} if field in row else {})}
            for name, row in zip(names, values, strict=True)
        ]
        if _distinct(more) > _distinct(names):
            names = more
    # Where nothing in the recipe differs, the data, the model or the seed did.
    return [
        {**name, "run": run_id} if names.count(name) > 1 else name
        for name, (run_id, _, _) in zip(names, runs, strict=True)
    ]


def _distinct(names: list[dict[str, Any]]) -> int:
    return len({repr(name) for name in names})


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested mappings by dotted field."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
