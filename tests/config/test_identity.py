"""The id of a run depends on everything that decides its result, and on nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from builders import RECIPE, ROOT, load_one
from hpcft.config import identity, recipe
from hpcft.config.recipe_types import FullRecipe

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def run_id(*overrides: str, name: str = "tiny.yaml", cluster: str = "local") -> str:
    loaded = load_one(*overrides, name=name)
    return identity.compute_run_id(loaded, cluster, identity.compute_fingerprints(loaded))


def test_run_id_is_the_same_for_equal_content_in_another_folder(tiny: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tiny.parent.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "train.jsonl").rename(copy / "renamed.jsonl")
    (copy / "tiny.yaml").write_text(RECIPE.replace("train.jsonl", "renamed.jsonl") + "# remark\n")
    assert run_id(name=str(copy / "tiny.yaml")) == run_id()
    assert re.fullmatch(r"[0-9a-f]{12}", run_id())


@pytest.mark.parametrize(
    "override",
    ["description=other", "baseline={source: a paper, metrics: {accuracy: 0.5}}", "train.seed=42"],
)
@pytest.mark.usefixtures("tiny")
def test_run_id_ignores_fields_that_do_not_change_the_result(override: str) -> None:
    assert run_id(override) == run_id()


@pytest.mark.usefixtures("tiny")
def test_run_id_changes_with_every_field_that_can_change_the_result(tiny: Path) -> None:
    changed = [
        run_id("train.seed=1"),
        run_id("name=other"),
        run_id("task.data.seed=1"),
        run_id("task.labels=[good, bad]"),
        run_id("evaluation.before=true"),
        run_id("resources.time_min=11"),
        run_id(cluster="other"),
    ]
    before = run_id()
    with (tiny.parent / "train.jsonl").open("a") as stream:
        stream.write("\n")
    changed.append(run_id())
    assert len({before, *changed}) == len(changed) + 1


@pytest.mark.usefixtures("tiny")
def test_run_id_depends_on_the_content_of_a_model_folder_not_on_its_name() -> None:
    folder = Path("tok")
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    first = run_id("model.tokenizer=./tok")
    folder.rename("moved")
    assert run_id("model.tokenizer=./moved") == first
    (Path("moved") / "tokenizer.json").write_text("{ }")
    assert run_id("model.tokenizer=./moved") != first


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_stored_recipe_is_read_back_with_the_same_run_id(path: Path) -> None:
    for point in recipe.load_recipe(str(path)):
        dumped = point.recipe.model_dump_json()
        again = FullRecipe.model_validate_json(dumped)
        assert again == point.recipe
        assert again.model_dump_json() == dumped
        fingerprints = identity.compute_fingerprints(again)
        assert identity.compute_run_id(again, "c", fingerprints) == identity.compute_run_id(
            point.recipe, "c", fingerprints
        )
