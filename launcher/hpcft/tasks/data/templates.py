"""Fills templates: texts with `{column}` in place of a column's text; `{{` is a brace."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator, Field


def _check_template(template: str) -> str:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"the template is malformed: {error}") from None
    for _, name, spec, conversion in parts:
        if name is not None and (not name or spec or conversion):
            raise ValueError(f"a template may only hold plain {{column}} fields, not {name!r}")
    return template


Template = Annotated[str, Field(min_length=1), AfterValidator(_check_template)]


def template_fields(template: str) -> list[str]:
    """Returns the columns that a template names, repeated ones included."""
    return [name for _, name, _, _ in string.Formatter().parse(template) if name]


def fill_template(template: str, values: Mapping[str, str]) -> str:
    """Returns the template with each column replaced by its value."""
    # `str.format` would take the column `a.b` for an attribute; here it is a name.
    parts = string.Formatter().parse(template)
    return "".join(text + (values[name] if name else "") for text, name, _, _ in parts)
