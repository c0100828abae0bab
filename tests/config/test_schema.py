"""JSON Schema accepts the shipped files, and the reference pages describe every field."""

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
from hpcft.metrics import metric_infos

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PROFILES = sorted((ROOT / "slurm").glob("*.yaml"))


def with_unknown_keys(value: Any) -> list[Any]:
    """Returns copies of a value with one unknown key each, in every mapping in turn."""
    if not isinstance(value, dict):
        return []
    changed_values = [{**value, "unknown_key": 1}]
    for key, part in value.items():
        if key not in ("config", "environment", "metrics"):  # the keys there are the user's
            changed_values += [{**value, key: changed} for changed in with_unknown_keys(part)]
    return changed_values


@pytest.mark.process
@pytest.mark.parametrize(
    ("kind", "path"),
    [("recipe", path) for path in RECIPES] + [("cluster", path) for path in PROFILES],
    ids=lambda part: part.stem if isinstance(part, Path) else part,
)
def test_schema_accepts_shipped_files_and_refuses_an_unknown_key(kind: str, path: Path) -> None:
    checker = jsonschema.Draft202012Validator(json_schema(kind))
    value = yaml_document.load_document(path).value
    assert [error.message for error in checker.iter_errors(value)] == []
    for changed in with_unknown_keys(value):
        assert not checker.is_valid(changed)


@pytest.mark.parametrize("kind", ["recipe", "cluster"])
def test_schema_command_prints_the_json_schema(kind: str, cli: Cli) -> None:
    said = cli("schema", kind)
    assert said.code == 0
    jsonschema.Draft202012Validator.check_schema(said.json)
    assert said.json == json_schema(kind)


def test_recipe_schema_accepts_extends_and_resources_auto() -> None:
    checker = jsonschema.Draft202012Validator(json_schema("recipe"))
    checker.validate({"extends": "quickstart", "resources": "auto"})
    assert not checker.is_valid({"extends": 5})
    assert not checker.is_valid({"name": "x"})


@pytest.mark.parametrize(("kind", "root"), [("recipe", FullRecipe), ("cluster", Cluster)])
def test_reference_page_describes_every_field(kind: str, root: Any) -> None:
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


def test_recipe_page_describes_every_metric() -> None:
    section = reference_page("recipe").partition("## Metrics\n")[2]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    assert {row.split("`")[1] for row in rows} == set(metric_infos())
    start = "| `perplexity` | perplexity | ↓ | from 1 | exp of the mean cross-entropy"
    assert any(row.startswith(start) for row in rows)
    assert "## Metrics" not in reference_page("cluster")
