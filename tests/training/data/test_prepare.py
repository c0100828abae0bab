"""Prepares a run's data in the job: unchanged inputs, and what the reader of the result is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from builders import cluster, film_rows, load_one, run_plan, submitted_run, write_rows
from hpcft.config import identity
from hpcft.core.errors import DataError
from hpcft.core.files import read_record, write_record
from hpcft.core.paths import RunPaths
from hpcft.core.records import Fingerprints
from hpcft.training.data.prepare import DataSummary, _check_unchanged, prepare_data


def submitted(
    folder: Path, *overrides: str, are_whole: bool = True, partly: bool = False
) -> RunPaths:
    """Writes a run folder with the fingerprints of its inputs."""
    folder.mkdir()
    recipe = load_one(*overrides)
    paths = submitted_run(folder, recipe, cluster("local"), run_plan()).paths
    hashes = identity.compute_fingerprints(recipe, partly=partly)
    write_record(paths.fingerprints, Fingerprints(files=hashes, are_whole=are_whole))
    return paths


@pytest.mark.usefixtures("tiny")
def test_prepare_data_notes_rows_that_are_trained_on_and_scored() -> None:
    rows = [*film_rows(1), {"text": "a new film", "label": "good"}]
    write_rows(Path("test.jsonl"), rows)
    paths = submitted(Path("run"))
    prepare_data(paths, load_one())
    (note,) = read_record(paths.prepared / "summary.json", DataSummary).notes
    assert note.startswith("test: 2 of 3 examples also stand in the train split, word for word")
    write_rows(Path("test.jsonl"), rows[2:])
    paths = submitted(Path("apart"))
    prepare_data(paths, load_one())
    assert read_record(paths.prepared / "summary.json", DataSummary).notes == []


@pytest.mark.usefixtures("tiny")
def test_prepare_data_refuses_data_that_changed_after_the_submission() -> None:
    paths = submitted(Path("run"))
    write_rows(Path("test.jsonl"), film_rows(1))
    with pytest.raises(DataError, match=r"task\.data\.files\.test: the files have changed since"):
        prepare_data(paths, load_one())


@pytest.mark.usefixtures("tiny")
def test_check_unchanged_reads_partial_hashes_of_0_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "PARTLY_HASHED_BYTES", 2**21)
    folder = Path("m")
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    weights = bytearray(3 * 2**20)
    (folder / "model.safetensors").write_bytes(weights)
    model = ("model.path=./m", "model.config=null", "model.tokenizer=null")
    old = submitted(Path("old"), *model, are_whole=False, partly=True)
    new = submitted(Path("new"), *model)
    assert read_record(old.fingerprints, Fingerprints) != read_record(
        new.fingerprints, Fingerprints
    )
    _check_unchanged(old)
    _check_unchanged(new)
    weights[len(weights) // 2] = 1
    (folder / "model.safetensors").write_bytes(weights)
    _check_unchanged(old)
    with pytest.raises(DataError, match=r"model\.path: the files have changed"):
        _check_unchanged(new)
