"""JSON Schema and reference page, both from the records' own fields."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from collections.abc import Iterator
from typing import Any

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.records import Cluster, Record

_MODELS: dict[str, type[Record]] = {"recipe": FullRecipe, "cluster": Cluster}


def json_schema(kind: str) -> dict[str, Any]:
    """The JSON Schema of a recipe or a cluster profile as files hold it."""
    made = _described(_MODELS[kind])
    if kind == "recipe":
        made["title"] = "Recipe"
        made["properties"]["extends"] = {
            "type": "string",
            "description": "A recipe's file or name; this one's fields are laid over it.",
        }
        # A recipe that extends another may leave all else out.
        made["anyOf"] = [{"required": ["extends"]}, {"required": made.pop("required")}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}


def _described(model: type[Record]) -> dict[str, Any]:
    """The JSON Schema of a record with the docstrings of its attributes as descriptions."""
    made = model.model_json_schema()
    records = {record.__name__: record for record in _records(Record)}
    for name, part in [(model.__name__, made), *made.get("$defs", {}).items()]:
        for cls in reversed(records[name].__mro__) if name in records else ():
            if issubclass(cls, Record):
                for field, text in _docstrings(cls).items():
                    if field in part.get("properties", {}):
                        part["properties"][field]["description"] = text
    return made


def _records(base: type[Record]) -> Iterator[type[Record]]:
    for record in base.__subclasses__():
        yield record
        yield from _records(record)


def _docstrings(cls: type[Record]) -> dict[str, str]:
    """What stands below each attribute of a class, which Python itself does not keep."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    return {
        attribute.target.id: inspect.cleandoc(text.value.value)
        for attribute, text in itertools.pairwise(node.body)
        if isinstance(attribute, ast.AnnAssign) and isinstance(attribute.target, ast.Name)
        and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }  # fmt: skip


def reference_page(kind: str) -> str:
    """The reference page in Markdown: a table for each section."""
    found = json_schema(kind)
    found["required"] = _MODELS[kind].model_json_schema()["required"]
    sections = [(found["title"], found), *found.get("$defs", {}).items()]
    lines = [
        f"# The fields of a {kind}",
        "",
        "Made by `make docs` from the records themselves; `hpcft schema` is the same for editors.",
        "",
    ]
    return "\n".join([*lines, *(line for name, part in sections for line in _section(name, part))])


def _section(name: str, part: dict[str, Any]) -> list[str]:
    if "properties" not in part:
        return []
    required = set(part.get("required", ()))
    lines = [f"## {name}", "", part.get("description", "").split("\n\n")[0], "",
             "| field | type | default | meaning |", "| --- | --- | --- | --- |"]  # fmt: skip
    for field, value in part["properties"].items():
        default = "required" if field in required else _default(value)
        meaning = " ".join(value.get("description", "").split()).replace("|", "\\|")
        lines.append(f"| `{field}` | {_type(value)} | {default} | {meaning} |")
    return [*lines, ""]


def _default(value: dict[str, Any]) -> str:
    import json

    return f"`{json.dumps(value['default'])}`" if "default" in value else ""


def _type(value: dict[str, Any]) -> str:
    if "$ref" in value:
        name = value["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    for key in ("anyOf", "oneOf"):
        if key in value:
            return " or ".join(dict.fromkeys(_type(option) for option in value[key]))
    if "enum" in value:
        return " or ".join(f"`{option}`" for option in value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    if value.get("type") == "array":
        return f"list of {_type(value.get('items', {}))}"
    kind = str(value.get("type", "anything"))
    return _WORDS.get(kind, kind)


_WORDS = {
    "integer": "whole number",
    "string": "text",
    "object": "mapping",
    "null": "nothing",
    "boolean": "true or false",
}
