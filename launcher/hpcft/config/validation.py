"""From documents to records: every problem at once, with its line and the nearest valid key."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

from hpcft.config.yaml_document import Document, Loc, Origin, dotted_key
from hpcft.core.errors import InputError, Problem

M = TypeVar("M")

_schema: Callable[[Any], Any] = functools.cache(lambda model: model.model_json_schema())


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
        details = error.errors(include_url=False)
        raise InputError(_problems(document, model, details)) from None


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
_OF_A_KEY = "[key]"  # pydantic's last location part where a key is wrong and not its value


def _expected(detail: Any) -> str | None:
    """The kind of value that was expected; None where the kind is right, but the value wrong."""
    if detail["loc"][-1:] == (_OF_A_KEY,):
        return None
    if detail["type"] == "literal_error":
        words = str(detail["ctx"]["expected"])
        return f"one of {words}" if " or " in words else words
    return _EXPECTED.get(detail["type"])


def _problems(document: Document, model: type[Any], details: Any) -> list[Problem]:
    """One problem for each place; what the members of a union expected there is told together."""
    located = [(_in_document(document.value, detail), detail) for detail in details]
    located.sort(key=lambda pair: _place(document.origin_of(pair[0])))
    expected: dict[Loc, list[str]] = {}
    for loc, detail in located:
        if word := _expected(detail):
            expected.setdefault(loc, []).append(word)
    # Where a member of a union found something wrong deeper inside, its kind was right.
    entered = {loc[:length] for loc, _ in located for length in range(len(loc))}
    problems = []
    for loc, detail in located:
        if _expected(detail) is None:
            problems.append(_problem(document, model, loc, detail))
        elif loc not in entered:
            what = f"expected {' or '.join(expected[loc])}, got {_shown(detail['input'])}"
            fix = (
                "quote it if text is meant"
                if "text" in expected[loc] and isinstance(detail["input"], int | float)
                else ""
            )
            problems.append(Problem(str(document.origin_of(loc)), dotted_key(loc), what, fix))
    return list(dict.fromkeys(problems))


def _place(origin: Origin) -> tuple[str, int]:
    return origin.source, origin.line or 0


def _problem(document: Document, model: type[Any], loc: Loc, detail: Any) -> Problem:
    kind, context = detail["type"], detail.get("ctx", {})
    where, key = str(document.origin_of(loc)), dotted_key(loc)
    got = f"got {_shown(detail['input'])}"
    if kind == "missing":
        return Problem(where, key, "is required", "add it")
    if kind == "extra_forbidden":
        known = _siblings(model, detail["loc"])
        near = difflib.get_close_matches(str(loc[-1]), known, n=3, cutoff=0.5)
        fix = f"did you mean {' or '.join(near)}?" if near else f"known here: {', '.join(known)}"
        return Problem(where, key, "unknown key", fix)
    if kind == "union_tag_invalid":
        where = str(document.origin_of((*loc, "name")))
        what = f"expected one of {context['expected_tags']}, got {_shown(context['tag'])}"
        return Problem(where, f"{key}.name", what)
    if kind == "union_tag_not_found":
        return Problem(where, f"{key}.name", "is required", "say which one")
    if kind == "string_pattern_mismatch":
        fix = f"it has to match {context['pattern']}"
        return Problem(where, key, f"has characters that are not allowed here, {got}", fix)
    if detail["loc"][-1:] == (_OF_A_KEY,) and kind == "literal_error":
        return Problem(where, key, "unknown key", f"known here: {context['expected']}")
    message = detail["msg"].removeprefix("Value error, ")
    return Problem(where, key, f"{message[0].lower()}{message[1:]}, {got}")


def _in_document(value: Any, detail: Any) -> Loc:
    """Pydantic's location without what is not in the document, but with a key that is missing.

    Pydantic puts the tags of unions and the names of union members between the keys.
    """
    real: list[str | int] = []
    for part in detail["loc"]:
        in_mapping = isinstance(value, dict) and part in value
        in_list = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if in_mapping or in_list:
            value = value[part]
            real.append(part)
    if detail["type"] == "missing":
        real.append(detail["loc"][-1])
    return tuple(real)


def _siblings(model: type[Any], loc: Loc) -> list[str]:
    """Names of the fields that are known where `loc` points, found in the JSON Schema."""
    node: Any = (schema := _schema(model))
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
