"""The id of a run depends on everything that decides its result, and on nothing else."""

from __future__ import annotations

import json
import re
from hashlib import sha256
from pathlib import Path

import pytest

from builders import RECIPE, ROOT, load_one
from hpcft.config import identity, recipe
from hpcft.config.recipe_types import FullRecipe
from hpcft.core.errors import DataError
from hpcft.core.units import MIB

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


# ---------------------------------------------------------------- all content counts


LARGE = identity.PARTLY_HASHED_BYTES + MIB


def large_model(folder: Path, *, byte: bytes = b"a") -> Path:
    """A model folder whose weights, over 64 MiB, differ from others in one byte of the middle."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with (folder / "model.safetensors").open("wb") as stream:
        stream.truncate(LARGE)
        stream.seek(LARGE // 2)
        stream.write(byte)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def model_fingerprint(**options: bool) -> str:
    loaded = load_one("model.path=./m", "model.config=null")
    return identity.compute_fingerprints(loaded, **options)["model.path"]


@pytest.mark.usefixtures("tiny")
def test_fingerprint_depends_on_every_byte_of_large_weights() -> None:
    large_model(Path("m"))
    before, partly = model_fingerprint(), model_fingerprint(partly=True)
    large_model(Path("m"), byte=b"b")
    assert model_fingerprint() != before
    assert model_fingerprint(partly=True) == partly, "hpcft 0.1 did not see it"
    large_model(Path("m"))
    assert model_fingerprint() == before


@pytest.mark.usefixtures("tiny")
def test_fingerprint_of_small_files_is_that_of_0_1() -> None:
    folder = Path("m")
    large_model(folder)
    (folder / "model.safetensors").write_bytes(b"weights")
    assert model_fingerprint() == model_fingerprint(partly=True)
    parts = b"".join(
        f"{file.name}\0{file.stat().st_size}\0".encode() + sha256(file.read_bytes()).digest()
        for file in sorted(folder.iterdir())
    )
    assert model_fingerprint() == sha256(parts).hexdigest()


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("shard", ["../other/model.safetensors", "sub/model.safetensors"])
def test_weights_that_lie_elsewhere_are_refused(shard: str) -> None:
    folder = large_model(Path("m"))
    index = json.dumps({"weight_map": {"a": "model.safetensors", "b": shard}})
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(DataError, match=f"model.path: .*index.json names {shard}, which does not"):
        model_fingerprint()
