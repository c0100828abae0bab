"""Tests of which checkpoints and lines of metrics.jsonl are removed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from builders import write_checkpoint
from hpcft.core import checkpoints
from hpcft.core.paths import RunPaths
from hpcft.training.checkpointing import retention


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path)


def steps(paths: RunPaths) -> list[int]:
    """Returns the steps of the published checkpoints."""
    return sorted(map(checkpoints.checkpoint_step, checkpoints.checkpoint_folders(paths)))


def test_remove_unfinished_keeps_published_checkpoints(paths: RunPaths) -> None:
    write_checkpoint(paths, 8)
    (paths.checkpoints / ".checkpoint-12.part/checkpoint-12").mkdir(parents=True)
    retention.remove_unfinished(paths)
    assert [folder.name for folder in paths.checkpoints.iterdir()] == ["checkpoint-8"]


def test_cut_metrics_keeps_first_bytes_and_later_recoveries(paths: RunPaths) -> None:
    lines = [{"kind": "step", "step": 1}, {"kind": "recovery", "number": 1},
             {"kind": "step", "step": 2}, {"kind": "recovery", "number": 2},
             {"kind": "step", "step": 3}]  # fmt: skip
    written = [json.dumps(line) + "\n" for line in lines]
    paths.metrics.write_text("".join(written) + '{"kind": "st')
    retention.cut_metrics(paths, len("".join(written[:2])))
    assert paths.metrics.read_text() == "".join([*written[:2], written[3]])


@pytest.mark.parametrize(
    ("limit", "kept"),
    [(1, [6, 20]), (2, [6, 12, 20]), (3, [6, 8, 12, 20]), (None, [6, 8, 12, 20])],
)
def test_remove_old_checkpoints_keeps_newest_best_and_requested(
    limit: int | None, kept: list[int], paths: RunPaths
) -> None:
    # That of step 30 was damaged, and is left over from before the run resumed from step 12.
    for step, requested in ((6, True), (8, True), (10, False), (12, True), (20, False), (30, True)):
        write_checkpoint(paths, step, user_requested=requested)
    best = str(paths.checkpoints / "checkpoint-6")
    retention.remove_old_checkpoints(
        paths, newest_step=20, best_folder=best, save_total_limit=limit
    )
    assert steps(paths) == kept
    retention.remove_resume_checkpoints(paths)
    assert steps(paths) == kept[:-1]
