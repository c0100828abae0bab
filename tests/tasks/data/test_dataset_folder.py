"""Reads data sets from folders: as on the hub, or as `save_to_disk` wrote them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from builders import film_rows, write_rows
from hpcft.config import identity, recipe
from hpcft.core.errors import DataError, InputError
from hpcft.tasks.data.examples import load_examples


def test_load_examples_reads_data_set_folders(tmp_path: Path, tiny: Path) -> None:
    """The folder holds files as on the hub, with configurations, or a saved data set."""
    import datasets

    folder = tmp_path / "films"
    for name in ("train", "test"):
        write_rows(tmp_path / f"{name}.jsonl", film_rows(4))
        (folder / "films").mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / f"{name}.jsonl", folder / "films")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: films\n  data_files:\n"
        "  - {split: train, path: films/train.jsonl}\n  - {split: test, path: films/test.jsonl}\n"
        "---\n"
    )
    whole = datasets.Dataset.from_list(film_rows(4))
    datasets.DatasetDict(train=whole, test=whole).save_to_disk(tmp_path / "saved")
    whole.save_to_disk(tmp_path / "alone")

    def examples(*changes: str) -> dict[str, int]:
        (point,) = recipe.load_recipe(str(tiny), ["task.data.files=null", *changes])
        return {name: len(rows) for name, rows in load_examples(point.recipe.task).splits.items()}

    both = "task.data.splits={train: train, test: test}"
    expected = {"train": 8, "test": 8}
    assert examples(f"task.data.path={folder}", "task.data.name=films", both) == expected
    assert examples(f"task.data.path={tmp_path}/saved", both) == expected
    alone = f"task.data.path={tmp_path}/alone"
    assert examples(alone, "task.data.fractions={train: 0.5, test: 0.5}") == {"train": 4, "test": 4}
    with pytest.raises(DataError, match="has no split test; it has train"):
        examples(alone, both)
    with pytest.raises(InputError, match="there is no folder"):
        examples("task.data.path=/nowhere/films")
    (point,) = recipe.load_recipe(str(tiny), ["task.data.files=null", f"task.data.path={folder}"])
    before = identity.compute_fingerprints(point.recipe)["task.data.path"]
    write_rows(folder / "films/test.jsonl", film_rows(3))
    assert identity.compute_fingerprints(point.recipe)["task.data.path"] != before
