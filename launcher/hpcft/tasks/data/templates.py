"""Fills templates: texts with `{column}` in place of a column's text; `{{` is a brace.

A column may be empty where the template says `{column?}`; otherwise the row cannot be used.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from hpcft.core.records.base import OneLine
from hpcft.tasks.base import BadRow, column_text, is_empty


def _check_template(template: str) -> str:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"the template is malformed: {error}") from None
    for _, name, spec, conversion in parts:
        if name is not None and (name in ("", "?") or spec or conversion):
            raise ValueError(f"a template may only hold plain {{column}} fields, not {name!r}")
    return template


Template = Annotated[str, Field(min_length=1), AfterValidator(_check_template)]
LineTemplate = Annotated[OneLine, AfterValidator(_check_template)]
# A field that is not set is left out of stored recipes, so that run ids stay what they were before
# the field existed.
UNLESS_NONE = Field(exclude_if=lambda value: value is None)


def template_fields(template: str) -> list[str]:
    """Returns the columns that a template names, repeated ones included."""
    return [name.removesuffix("?") for name in _names(template)]


def fill_template(template: str, row: Mapping[str, Any]) -> str:
    """Returns the template with the text of a row's column in the place of each field.

    Raises:
        BadRow: a column is empty that must not be, or is not text.
    """
    values = {name: _value(row, name) for name in _names(template)}
    # `str.format` would take the column `a.b` for an attribute; here it is a name.
    parts = string.Formatter().parse(template)
    return "".join(text + (values[name] if name else "") for text, name, _, _ in parts)


def choose_prompt(prompt: str, when_empty: str | None, row: Mapping[str, Any]) -> str:
    """Returns the template of a row's prompt.

    Args:
        prompt: template of the rows that have all its texts.
        when_empty: template of the others, if there is one: of those in which a column is empty
            that `prompt` needs and this one does not.
        row: the row.
    """
    if when_empty is None:
        return prompt
    needed = {*template_fields(prompt)} - {*template_fields(when_empty)}
    return when_empty if any(is_empty(row.get(column)) for column in needed) else prompt


def fill_choices(templates: list[str], row: Mapping[str, Any], field: str) -> list[str]:
    """Returns the choices of a row.

    Args:
        templates: their templates.
        row: the row.
        field: name of the templates' field in the task.

    Raises:
        BadRow: two are the same, or a column that they name cannot be used.
    """
    choices = [fill_template(template, row) for template in templates]
    if len(set(choices)) < len(choices):
        columns = {column: None for template in templates for column in template_fields(template)}
        repeated = next(choice for choice in choices if choices.count(choice) > 1)
        what = f"two of task.{field} are {repeated!r:.80}"
        raise BadRow(", ".join(columns) or field, what, "correct the row, or remove it")
    return choices


def _names(template: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(template) if name]


def _value(row: Mapping[str, Any], name: str) -> str:
    column = name.removesuffix("?")
    return "" if column != name and is_empty(row.get(column)) else column_text(row, column)
