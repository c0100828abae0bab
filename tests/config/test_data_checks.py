"""What a recipe says of its data is checked before anything is read."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from builders import RECIPE, load_one, recipe_problems

FILES = "{ train: train.jsonl, test: test.jsonl }"


def test_data_without_the_scored_split_names_the_way_out(tiny: Path) -> None:
    tiny.write_text(RECIPE.replace(FILES, "{ train: train.jsonl }"))
    (problem,) = recipe_problems()
    assert "evaluation.split: the data has no test split; cut one from what there is" in problem
    assert "task.data.fractions: {train: 0.8, test: 0.2}" in problem
    assert load_one("task.data.fractions={train: 0.8, test: 0.2}")
    tiny.write_text(RECIPE.replace(FILES, "{ train: train.jsonl, validation: test.jsonl }"))
    (problem,) = recipe_problems()
    assert "use validation, or cut one" in problem
    assert load_one("evaluation.split=validation")


def _link(file: Path) -> None:
    file.symlink_to("train.jsonl")


def _hard_link(file: Path) -> None:
    os.link("train.jsonl", file)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("split", ["test", "validation"])
@pytest.mark.parametrize("name", ["train.jsonl", "./train.jsonl", "link.jsonl", "hard.jsonl"])
def test_file_that_is_trained_on_is_refused_for_another_split(name: str, split: str) -> None:
    _link(Path("link.jsonl"))
    _hard_link(Path("hard.jsonl"))
    (problem,) = recipe_problems(f"task.data.files.{split}={name}")
    assert f"task.data.files.{split}: the rows of " in problem
    assert "are trained on, too" in problem
    assert "task.data.fractions" in problem
    # A model that is scored as it is has been trained on neither.
    others = "".join(f"{other}: test.jsonl, " for other in ("test",) if other != split)
    files = f"{{train: train.jsonl, {others}{split}: {name}}}"
    task = f"{{name: prompting, labels: [bad, good], prompt: '{{text}}', data: {{files: {files}}}}}"
    asked = load_one(f"task={task}", "method={name: frozen}", "model.path=org/name")
    assert asked.mode == "few_shot"


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("splits", "refused"),
    [
        ("{train: train, test: train}", True),
        ("{train: train+validation, test: validation}", True),
        ("{train: train, test: test + train}", True),
        ("{train: train+test, validation: validation, test: dev}", False),
        ("{train: train, validation: test, test: test}", False),
    ],
)
def test_split_that_is_trained_on_is_refused_for_another_split(splits: str, refused: bool) -> None:
    overrides = ["task.data.files=null", "task.data.path=org/name", f"task.data.splits={splits}"]
    if refused:
        (problem,) = recipe_problems(*overrides)
        assert "task.data.splits.test: the rows of " in problem
    else:
        load_one(*overrides)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    "name", ["test.tsv", "test.tsv.gz", "TEST.CSV", "a.b.jsonl.gz", "t.ndjson", "t.txt", "t.arrow"]
)
def test_files_of_known_formats_are_accepted(name: str) -> None:
    Path(name).write_bytes(gzip.compress(b"text"))
    load_one(f"task.data.files.test={name}")


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", ["test.xlsx", "test", "test.parquet.gz", "test.gz", ".gz"])
def test_files_of_other_formats_are_refused_with_the_known_ones(name: str) -> None:
    Path(name).write_bytes(b"text")
    (problem,) = recipe_problems(f"task.data.files.test={name}")
    assert "expected .csv, .tsv, .jsonl, .ndjson, .json, .txt (each also with .gz), .par" in problem
    assert problem.endswith("convert the file, or rename it if it has one of these formats")


@pytest.mark.usefixtures("tiny")
def test_pipe_is_refused_for_what_it_is() -> None:
    os.mkfifo("pipe.jsonl")
    (problem,) = recipe_problems("task.data.files.test=pipe.jsonl")
    assert "pipe.jsonl is not a regular file, which can be read again when the job" in problem
