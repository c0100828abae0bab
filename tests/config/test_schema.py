"""The schema takes what is shipped, and its pages have every field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from builders import ROOT, Cli
from hpcft.config import yaml_document
from hpcft.config.recipe_types import FullRecipe
from hpcft.config.schema import json_schema, reference_page
from hpcft.core.records import Cluster

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PROFILES = sorted((ROOT / "slurm").glob("*.yaml"))


def with_unknown_keys(value: Any) -> list[Any]:
    """The value with one key too many, in every mapping in turn."""
    if not isinstance(value, dict):
        return []
    found = [{**value, "unknown_key": 1}]
    for key, part in value.items():
        if key not in ("config", "environment", "metrics"):  # whose keys are the user's
            found += [{**value, key: changed} for changed in with_unknown_keys(part)]
    return found


@pytest.mark.parametrize(
    ("kind", "path"),
    [("recipe", path) for path in RECIPES] + [("cluster", path) for path in PROFILES],
    ids=lambda part: part.stem if isinstance(part, Path) else part,
)
def test_the_schema_takes_what_is_shipped_and_refuses_an_unknown_key(kind: str, path: Path) -> None:
    checker = jsonschema.Draft202012Validator(json_schema(kind))
    value = yaml_document.load_document(path).value
    assert [error.message for error in checker.iter_errors(value)] == []
    for changed in with_unknown_keys(value):
        assert not checker.is_valid(changed)


@pytest.mark.parametrize("kind", ["recipe", "cluster"])
def test_the_schema_is_printed(kind: str, cli: Cli) -> None:
    said = cli("schema", kind)
    assert said.code == 0
    jsonschema.Draft202012Validator.check_schema(said.json)
    assert said.json == json_schema(kind)


def test_the_schema_knows_extends_and_auto() -> None:
    checker = jsonschema.Draft202012Validator(json_schema("recipe"))
    checker.validate({"extends": "quickstart", "resources": "auto"})
    assert not checker.is_valid({"extends": 5})
    assert not checker.is_valid({"name": "x"})


@pytest.mark.parametrize(("kind", "root"), [("recipe", FullRecipe), ("cluster", Cluster)])
def test_the_reference_page_has_every_field(kind: str, root: Any) -> None:
    schema = json_schema(kind)
    json.dumps(schema)
    page = reference_page(kind)
    parts = {schema["title"]: schema, **schema.get("$defs", {})}
    assert set(root.model_fields) <= set(schema["properties"])
    for title, part in parts.items():
        if "properties" not in part:
            continue
        section = page.partition(f"## {title}\n")[2].partition("\n## ")[0]
        rows = [line for line in section.splitlines() if line.startswith("| `")]
        assert [row.split("`")[1] for row in rows] == list(part["properties"]), title
        for row in rows:
            meaning = row.replace(r"\|", "").split(" | ")[-1].rstrip(" |")
            assert meaning, f"{title}: {row} says nothing"
