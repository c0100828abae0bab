"""From documents to records: every problem at once, with its line and the nearest valid key."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

from hpcft.document import Document, Loc, dotted
from hpcft.errors import InputError, Problem

M = TypeVar("M")


def validate(document: Document, model: type[M]) -> M:
    """The record that a document describes.

    Args:
        document: plain values with their origins.
        model: a pydantic record class.

    Raises:
        InputError: with every problem found, each with line, key, what was got and what to write.
    """
    import json

    from pydantic import BaseModel, ValidationError

    assert issubclass(model, BaseModel)
    try:
        return model.model_validate_json(json.dumps(document.value))
    except ValidationError as error:
        problems = [_problem(document, model, detail) for detail in error.errors(include_url=False)]
        raise InputError(list(dict.fromkeys(problems))) from None


_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}


def _problem(document: Document, model: type[Any], detail: Any) -> Problem:
    loc, tail = _in_document(document.value, detail["loc"])
    kind, context = detail["type"], detail.get("ctx", {})
    origin = document.origin_of((*loc, *tail))
    key = dotted((*loc, *tail))
    got = f"got {_shown(detail['input'])}"
    if kind == "missing":
        return Problem(str(origin), key, "is required", "add it")
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(
            str(loc[-1]), _siblings(model, detail["loc"]), n=3, cutoff=0.5
        )
        return Problem(
            str(origin),
            key,
            "unknown key",
            f"did you mean {' or '.join(near)}?"
            if near
            else f"known here: {', '.join(sorted(_siblings(model, detail['loc'])))}",
        )
    if kind in ("union_tag_invalid", "literal_error"):
        expected = str(context.get("expected_tags") or context.get("expected", ""))
        got = f"got {_shown(context.get('tag', detail['input']))}"
        return Problem(str(origin), key, f"expected one of {expected}, {got}")
    if kind == "union_tag_not_found":
        return Problem(str(origin), f"{key}.name", "is required", "say which one")
    if kind == "string_pattern_mismatch":
        return Problem(
            str(origin),
            key,
            f"has characters that are not allowed here, {got}",
            f"it has to match {context['pattern']}",
        )
    fix = (
        "quote it if text is meant" if kind == "string_type" and detail["input"] is not None else ""
    )
    if kind in _EXPECTED:
        return Problem(str(origin), key, f"expected {_EXPECTED[kind]}, {got}", fix)
    message = detail["msg"].removeprefix("Value error, ")
    return Problem(str(origin), key, f"{message[0].lower()}{message[1:]}, {got}")


def _in_document(value: Any, loc: Loc) -> tuple[Loc, Loc]:
    """Splits pydantic's location into the part that exists in the document and a missing key.

    Pydantic puts the tags of unions and the names of union members between the keys; they are left
    out.
    """
    real: list[str | int] = []
    rest: list[str | int] = []
    for position, part in enumerate(loc):
        in_mapping = isinstance(value, dict) and part in value
        in_list = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if in_mapping or in_list:
            value = value[part]
            real.append(part)
        elif isinstance(value, dict) and position == len(loc) - 1:
            rest.append(part)
    return tuple(real), tuple(rest)


def _siblings(model: type[Any], loc: Loc) -> list[str]:
    """Names of the fields that are known where `loc` points, found in the JSON Schema."""
    schema = model.model_json_schema()
    node: Any = schema
    for part in loc[:-1]:
        node = _resolve(node, schema, part)
    return sorted(_properties(node, schema))


def _options(node: Any, schema: Any) -> list[Any]:
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
    inner = node.get("anyOf") or node.get("oneOf") or node.get("allOf")
    return [o for item in inner for o in _options(item, schema)] if inner else [node]


def _properties(node: Any, schema: Any) -> set[str]:
    return {name for option in _options(node, schema) for name in option.get("properties", {})}


def _resolve(node: Any, schema: Any, part: str | int) -> Any:
    """The schema below `part`: a property, a list item or the union member of that name."""
    options = _options(node, schema)
    for option in options:
        name = option.get("properties", {}).get("name", {})
        if part in (name.get("const"), option.get("title")):
            return option
    for option in options:
        if part in option.get("properties", {}):
            return option["properties"][part]
        if isinstance(part, int) and "items" in option:
            return option["items"]
    return node


def _shown(value: Any) -> str:
    """A value as a user wrote it, short and with control characters escaped."""
    import json

    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}…"
