"""A run whose training diverged completes, and its result says so."""

from __future__ import annotations

from pathlib import Path

import starts
from builders import film_rows, write_rows
from hpcft.core.files import read_record
from hpcft.core.paths import RunPaths
from hpcft.core.records import RunRecord


def test_diverged_training_is_noted_in_the_result(tiny: Path, tmp_path: Path) -> None:
    """A learning rate far too high: the loss at the end is far above the one of a guess."""
    for name in ("train", "test"):
        write_rows(tiny.with_name(f"{name}.jsonl"), film_rows(12))
    overrides = ("train.learning_rate=5", "train.max_steps=8", "train.logging_steps=1")
    folder = starts.make_run(tmp_path / "run", tiny, *overrides)
    assert starts.start(folder) == [0]
    result = read_record(RunPaths(folder).result, RunRecord)
    assert result.doubts[0].startswith("the training diverged: its loss rose from ")
    assert result.notes[0] == result.doubts[0]
