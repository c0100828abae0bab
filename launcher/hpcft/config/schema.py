"""Generates JSON Schema and reference pages of recipes and profiles from the records."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from collections.abc import Iterator
from typing import Any

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.records import Cluster, Record
from hpcft.metrics import METRICS, direction_arrow, load_metric

TITLES = {"recipe": "recipe", "cluster": "cluster profile"}
_MODELS: dict[str, type[Record]] = {"recipe": FullRecipe, "cluster": Cluster}


def json_schema(kind: str) -> dict[str, Any]:
    """Returns the JSON Schema of the YAML files of a kind.

    Args:
        kind: `recipe` or `cluster`.
    """
    schema = _described_schema(_MODELS[kind])
    if kind == "recipe":
        schema["title"] = "Recipe"
        schema["properties"]["extends"] = {
            "type": "string",
            "description": "File or name of a recipe; the fields of this one are laid over it.",
        }
        # A recipe that extends another may leave all else out.
        schema["anyOf"] = [{"required": ["extends"]}, {"required": schema.pop("required")}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _described_schema(model: type[Record]) -> dict[str, Any]:
    """Returns the JSON Schema of a record with the docstrings of its fields as descriptions.

    Pydantic's own `use_attribute_docstrings` would read the sources at every start of hpcft.
    """
    schema = model.model_json_schema()
    records = {record.__name__: record for record in _subclasses(Record)}
    for name, part in [(model.__name__, schema), *schema.get("$defs", {}).items()]:
        for cls in reversed(records[name].__mro__) if name in records else ():
            if issubclass(cls, Record):
                for field, text in _field_docstrings(cls).items():
                    if field in part.get("properties", {}):
                        part["properties"][field]["description"] = text
    return schema


def _subclasses(base: type[Record]) -> Iterator[type[Record]]:
    """Yields the subclasses of a record, and theirs."""
    for record in base.__subclasses__():
        yield record
        yield from _subclasses(record)


def _field_docstrings(cls: type[Record]) -> dict[str, str]:
    """Returns the docstring below each field of a class, which Python itself does not keep."""
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
    """Returns the reference page of a kind in Markdown, with a table for each section.

    Args:
        kind: `recipe` or `cluster`.
    """
    schema = json_schema(kind)
    schema["required"] = _MODELS[kind].model_json_schema()["required"]
    sections = [(schema["title"], schema), *schema.get("$defs", {}).items()]
    lines = [
        f"# Reference: fields of a {TITLES[kind]}",
        "",
        "This page is generated from the records by `make docs`. `hpcft schema` prints the same as",
        "JSON Schema, with which editors complete and check YAML files.",
        "",
        *(line for name, part in sections for line in _section(name, part)),
    ]
    return "\n".join([*lines, *_metrics_section()] if kind == "recipe" else lines)


def _section(name: str, part: dict[str, Any]) -> list[str]:
    """Returns the lines of a record's section; none for what is not a record."""
    if "properties" not in part:
        return []
    required = set(part.get("required", ()))
    lines = [f"## {name}", "", part.get("description", "").split("\n\n")[0], "",
             "| field | type | default | meaning |", "| --- | --- | --- | --- |"]  # fmt: skip
    for field, value in part["properties"].items():
        default = "required" if field in required else _default_text(value)
        meaning = " ".join(value.get("description", "").split()).replace("|", "\\|")
        lines.append(f"| `{field}` | {_type_text(value)} | {default} | {meaning} |")
    return [*lines, ""]


def _default_text(value: dict[str, Any]) -> str:
    import json

    return f"`{json.dumps(value['default'])}`" if "default" in value else ""


def _type_text(value: dict[str, Any]) -> str:
    """Returns the type of a field in words."""
    if "$ref" in value:
        name = value["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    for key in ("anyOf", "oneOf"):
        if key in value:
            return " or ".join(dict.fromkeys(_type_text(option) for option in value[key]))
    if "enum" in value:
        return " or ".join(f"`{option}`" for option in value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    if value.get("type") == "array":
        return f"list of {_type_text(value.get('items', {}))}"
    kind = str(value.get("type", "anything"))
    return _TYPE_WORDS.get(kind, kind)


_TYPE_WORDS = {
    "integer": "whole number",
    "string": "text",
    "object": "mapping",
    "null": "nothing",
    "boolean": "true or false",
}


def _metrics_section() -> list[str]:
    """Returns the lines of the section on metrics, with a table for all modules."""
    lines = [
        "## Metrics",
        "",
        "Names for `train.metric_for_best_model`, `baseline.metrics` and `hpcft collect --metric`.",
        "↑: higher is better, ↓: lower is better. `[]` stands for each label in brackets.",
        "",
        "| metric | module | better | scale | meaning |",
        "| --- | --- | --- | --- | --- |",
    ]
    for module in METRICS:
        for name, info in load_metric(module).infos.items():
            arrow = direction_arrow(name)
            lines.append(f"| `{name}` | {module} | {arrow} | {info.scale} | {info.description} |")
    return [*lines, ""]
