"""A data set may be a folder, as on the hub or as it was saved."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from builders import film_rows, write_rows
from hpcft.config import identity, recipe
from hpcft.core.errors import DataError, InputError
from hpcft.tasks.data.examples import load_examples


def test_a_data_set_may_be_a_folder(tmp_path: Path, tiny: Path) -> None:
    """Files as on the hub, with several configurations, or what `save_to_disk` wrote."""
    import datasets

    written = tmp_path / "films"
    for name in ("train", "test"):
        write_rows(tmp_path / f"{name}.jsonl", film_rows(4))
        (written / "films").mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / f"{name}.jsonl", written / "films")
    (written / "README.md").write_text(
        "---\nconfigs:\n- config_name: films\n  data_files:\n"
        "  - {split: train, path: films/train.jsonl}\n  - {split: test, path: films/test.jsonl}\n"
        "---\n"
    )
    whole = datasets.Dataset.from_list(film_rows(4))
    datasets.DatasetDict(train=whole, test=whole).save_to_disk(tmp_path / "saved")
    whole.save_to_disk(tmp_path / "alone")

    def examples(*changes: str) -> dict[str, int]:
        (point,) = recipe.load_recipe(str(tiny), ["task.data.files=null", *changes])
        return {name: len(found) for name, found in load_examples(point.recipe.task).splits.items()}

    both = "task.data.splits={train: train, test: test}"
    expected = {"train": 8, "test": 8}
    assert examples(f"task.data.path={written}", "task.data.name=films", both) == expected
    assert examples(f"task.data.path={tmp_path}/saved", both) == expected
    alone = f"task.data.path={tmp_path}/alone"
    assert examples(alone, "task.data.fractions={train: 0.5, test: 0.5}") == {"train": 4, "test": 4}
    with pytest.raises(DataError, match="has no split test; it has train"):
        examples(alone, both)
    with pytest.raises(InputError, match="there is no folder"):
        examples("task.data.path=/nowhere/films")
    (point,) = recipe.load_recipe(str(tiny), ["task.data.files=null", f"task.data.path={written}"])
    first = identity.compute_fingerprints(point.recipe)["task.data.path"]
    write_rows(written / "films/test.jsonl", film_rows(3))
    assert identity.compute_fingerprints(point.recipe)["task.data.path"] != first
