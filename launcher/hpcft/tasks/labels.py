"""Finds the label of a row: by its name, by the data set's own class names, or by its index."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hpcft.tasks.base import BadRow, shorten_list
from hpcft.tasks.data.class_values import ClassValue, PlainIndex

_INTEGER = re.compile(r"-?[0-9]{1,9}")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?")


def label_index(row: Mapping[str, Any], column: str, labels: list[str]) -> int:
    """Returns the index of the label in a column, which holds its name or its index.

    The index of a `ClassLabel` column means the data set's own class of that name, whatever the
    order of the labels. `true` and `false` match a label in any letter case, and numbers one
    of equal value, because file formats write them differently.

    Raises:
        BadRow: it holds neither.
    """
    value = row.get(column)
    if isinstance(value, ClassValue):
        return _class_index(value, column, labels)
    if value is None:
        what = f"the label is missing; expected one of {shorten_list(labels)}"
        raise BadRow(column, what, "fill it in, or remove the row")
    text = str(value)
    for name in (text, text.strip()):
        if name in labels:
            return labels.index(name)
    if (written := _canonical(text)) is not None:
        same = [index for index, label in enumerate(labels) if _canonical(label) == written]
        if len(same) == 1:
            return same[0]
    # A number is taken as an index only where no label is a number (labels 1 to 5, for example).
    is_index = _INTEGER.fullmatch(text.strip()) and not isinstance(value, bool | float)
    if not is_index or any(map(_INTEGER.fullmatch, labels)):
        raise BadRow(
            column,
            f"expected one of {shorten_list(labels)}, got {value!r:.80}",
            "correct the row or add the label to task.labels",
        )
    index = int(text)
    if index == -1:
        raise _no_label(column)
    if not 0 <= index < len(labels):
        raise BadRow(
            column,
            f"expected an index below {len(labels)}, got {index}",
            "indices begin at 0: write the label's name into the column, or list it in task.labels",
        )
    return PlainIndex(index)


def _class_index(value: ClassValue, column: str, labels: Sequence[str]) -> int:
    """Returns the index of the label that has the name of a data set's class.

    Raises:
        BadRow: no label has it.
    """
    if value.name in labels:
        return labels.index(value.name)
    if value == -1:
        raise _no_label(column)
    if value.name is None:
        raise BadRow(column, f"expected an index below {len(value.names)}, got {int(value)}")
    raise BadRow(
        column,
        f"the data set calls its classes {shorten_list(value.names)}, and task.labels are "
        f"{shorten_list(labels)}",
        "list the data set's own names in task.labels, in any order",
        is_in_every_row=True,
    )


def _no_label(column: str) -> BadRow:
    return BadRow(
        column,
        "the row has no label (-1, as in GLUE's test splits)",
        "use a labelled split, for example evaluation.split: validation",
    )


def _canonical(text: str) -> str | None:
    """Returns a truth value or a number in one way of writing it; None for other texts."""
    text = text.strip()
    if text.lower() in ("true", "false"):
        return text.lower()
    return repr(float(text)) if _NUMBER.fullmatch(text) else None
