"""Validates documents against records, and reports every problem with its line."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

from hpcft.config.yaml_document import Document, Loc, Origin, dotted_key
from hpcft.core.errors import InputError, Problem

M = TypeVar("M")

_json_schema: Callable[[Any], Any] = functools.cache(lambda model: model.model_json_schema())


def validate(document: Document, model: type[M]) -> M:
    """Returns the record that a document describes.

    Args:
        document: plain values with their origins.
        model: a pydantic record class.

    Raises:
        InputError: with every problem, each with file and line, key, value and what to write.
    """
    import json

    from pydantic import BaseModel, ValidationError

    assert issubclass(model, BaseModel)
    try:
        return model.model_validate_json(json.dumps(document.value))
    except ValidationError as error:
        details = error.errors(include_url=False)
        raise InputError(_problems(document, model, details)) from None


_KINDS = {
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
_BOUNDS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")
# Filled in with pydantic's context; the shortest text that any record asks for is one character.
_LENGTHS = {
    "too_short": "at least {min_length} items",
    "too_long": "at most {max_length} items",
    "string_too_short": "text that is not empty",
    "string_too_long": "at most {max_length} characters",
}
_OTHER_NAMES = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "batch_size": "global_batch_size",
    "train_batch_size": "global_batch_size",
    "gradient_accumulation_steps": "global_batch_size",
    "wd": "weight_decay",
    "warmup": "warmup_steps",
    "warmup_ratio": "warmup_steps",
    "scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "cutoff_len": "max_length",
    "model_name_or_path": "path",
    "name_or_path": "path",
    "gpus": "gpus_per_node",
    "walltime": "time_min",
    "time": "time_min",
}
"""Names of fields in other tools and in everyday use, and the name here."""
_KEY_ITSELF = "[key]"  # pydantic's last location part if a key is wrong and not its value


def _expected_kind(detail: Any) -> str | None:
    """Returns the kind of value that was expected; None if only the value is wrong."""
    if detail["loc"][-1:] == (_KEY_ITSELF,):
        return None
    if detail["type"] == "literal_error":
        words = str(detail["ctx"]["expected"])
        return f"one of {words}" if " or " in words else words
    return _KINDS.get(detail["type"])


def _problems(document: Document, model: type[Any], details: Any) -> list[Problem]:
    """Returns one problem for each place, with all kinds that a union allows there."""
    located = [(_in_document(document.value, detail), detail) for detail in details]
    located.sort(key=lambda pair: _source_and_line(document.origin_of(pair[0])))
    expected: dict[Loc, list[str]] = {}
    for loc, detail in located:
        if kind := _expected_kind(detail):
            expected.setdefault(loc, []).append(kind)
    # Where a member of a union found something wrong deeper inside, its kind was right.
    entered = {loc[:length] for loc, _ in located for length in range(len(loc))}
    problems = []
    for loc, detail in located:
        if _expected_kind(detail) is None:
            problems.append(_problem(document, model, loc, detail))
        elif loc not in entered:
            what = f"expected {' or '.join(expected[loc])}, got {_as_json(detail['input'])}"
            is_number = isinstance(detail["input"], int | float)
            fix = "quote it if text is meant" if "text" in expected[loc] and is_number else ""
            if expected[loc] == ["a mapping"] and isinstance(detail["input"], str):
                fix = _section_for(model, loc, detail["input"])
            problems.append(Problem(str(document.origin_of(loc)), dotted_key(loc), what, fix))
    return list(dict.fromkeys(problems))


def _section_for(model: type[Any], loc: Loc, text: str) -> str:
    """Returns the section to write where only a name stands: `model: gpt2`."""
    known = _sibling_fields(model, (*loc, ""))
    field = next((name for name in ("name", "path") if name in known), "")
    return f"write {dotted_key(loc)}: {{ {field}: {_as_json(text)} }}" if field else ""


def _source_and_line(origin: Origin) -> tuple[str, int]:
    return origin.source, origin.line or 0


def _problem(document: Document, model: type[Any], loc: Loc, detail: Any) -> Problem:
    """Returns the problem for an error that is not about the kind of a value."""
    kind, context = detail["type"], detail.get("ctx", {})
    where, key = str(document.origin_of(loc)), dotted_key(loc)
    got = f"got {_as_json(detail['input'])}"
    if kind == "missing":
        return Problem(where, key, "is required", "add it")
    if kind == "extra_forbidden":
        known = _sibling_fields(model, detail["loc"])
        meant = _OTHER_NAMES.get(str(loc[-1]), "")
        near = difflib.get_close_matches(str(loc[-1]), known, n=3, cutoff=0.5)
        near = [meant] if meant in known else near
        fix = f"did you mean {' or '.join(near)}?" if near else f"known here: {', '.join(known)}"
        return Problem(where, key, "unknown key", fix)
    if kind == "union_tag_invalid":
        where = str(document.origin_of((*loc, "name")))
        what = f"expected one of {context['expected_tags']}, got {_as_json(context['tag'])}"
        return Problem(where, f"{key}.name", what)
    if kind == "union_tag_not_found":
        return Problem(where, f"{key}.name", "is required", f"name the {loc[-1]} to use")
    if kind == "string_pattern_mismatch":
        fix = f"it has to match {context['pattern']}"
        return Problem(where, key, f"has characters that are not allowed here, {got}", fix)
    if detail["loc"][-1:] == (_KEY_ITSELF,) and kind == "literal_error":
        return Problem(where, key, "unknown key", f"known here: {context['expected']}")
    if kind in _BOUNDS:
        bound = detail["msg"].removeprefix("Input should be ")
        return Problem(where, key, f"expected a number {bound}, {got}")
    if kind in _LENGTHS:
        return Problem(where, key, f"expected {_LENGTHS[kind].format(**context)}, {got}")
    message = detail["msg"].removeprefix("Value error, ")
    return Problem(where, key, f"{message[0].lower()}{message[1:]}, {got}")


def _in_document(value: Any, detail: Any) -> Loc:
    """Returns the place of an error in the document, or that of the key that is missing.

    Pydantic's own location also has the tags of unions and the names of union members.
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


def _sibling_fields(model: type[Any], loc: Loc) -> list[str]:
    """Returns the names of the fields that are known where `loc` points, from the JSON Schema."""
    node: Any = (schema := _json_schema(model))
    for part in loc[:-1]:
        node = _schema_below(node, schema, part)
    return sorted(_property_names(node, schema))


def _union_members(node: Any, schema: Any) -> list[Any]:
    """Returns the schemas of a union's members; the schema itself if it is not a union."""
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
    inner = node.get("anyOf") or node.get("oneOf") or node.get("allOf")
    return [o for item in inner for o in _union_members(item, schema)] if inner else [node]


def _property_names(node: Any, schema: Any) -> set[str]:
    members = _union_members(node, schema)
    return {name for member in members for name in member.get("properties", {})}


def _schema_below(node: Any, schema: Any, part: str | int) -> Any:
    """Returns the schema of a property, of a list's items or of the union member of that name."""
    members = _union_members(node, schema)
    for member in members:
        name = member.get("properties", {}).get("name", {})
        if part in (name.get("const"), member.get("title")):
            return member
    for member in members:
        if part in member.get("properties", {}):
            return member["properties"][part]
        if isinstance(part, int) and "items" in member:
            return member["items"]
    return node


def _as_json(value: Any) -> str:
    """Returns a value as JSON, which escapes control characters, cut to 60 characters."""
    import json

    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}…"
