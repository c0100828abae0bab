"""Tests of finding the newest complete checkpoint."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import write_checkpoint
from hpcft.core import checkpoints
from hpcft.core.files import write_record
from hpcft.core.paths import RunPaths
from hpcft.recovery import log


def test_latest_checkpoint_takes_newest_by_number(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    assert checkpoints.latest_checkpoint(paths) == (None, [])
    for step in (8, 9, 10):
        write_checkpoint(paths, step)
    checkpoint, skipped = checkpoints.latest_checkpoint(paths)
    assert checkpoint is not None
    assert (checkpoint.record.step, skipped) == (10, [])


def _copy_marker_of_step_8(folder: Path) -> None:
    shutil.copyfile(folder.parent / "checkpoint-8/checkpoint.json", folder / "checkpoint.json")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated shard": (lambda f: os.truncate(f / "global_step12/shard.pt", 60),
                        "global_step12/shard.pt has 60 of 100 bytes"),
    "missing shard": (lambda f: (f / "global_step12/shard.pt").unlink(),
                      "global_step12/shard.pt: No such file or directory"),
    "no marker": (lambda f: (f / "checkpoint.json").unlink(), "it has no checkpoint.json"),
    "marker is no JSON": (lambda f: (f / "checkpoint.json").write_bytes(b"\x80\x04."),
                          "checkpoint.json: is damaged"),
    "wrong latest": (lambda f: (f / "latest").write_text("global_step8"),
                     "latest names 'global_step8' instead of 'global_step12'"),
    "no latest": (lambda f: (f / "latest").unlink(), "latest: No such file or directory"),
    "marker of another step": (_copy_marker_of_step_8, "checkpoint.json is of step 8"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_latest_checkpoint_damaged_one_is_skipped_with_a_note(kind: str, tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    write_checkpoint(paths, 8)
    folder = write_checkpoint(paths, 12)
    damage, reason = DAMAGE[kind]
    damage(folder)
    checkpoint, (note,) = checkpoints.latest_checkpoint(paths)
    assert checkpoint is not None
    assert checkpoint.record.step == log.saved_step(paths) == 8
    assert note.startswith("checkpoint-12 was damaged (")
    assert reason in note


def _flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[50] ^= 0b100
    file.write_bytes(content)


def test_latest_checkpoint_with_a_flipped_bit_is_skipped_with_a_note(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    for step in (8, 12):
        folder = write_checkpoint(paths, step)
        name = f"global_step{step}/shard.pt"
        record = checkpoints.latest_checkpoint(paths)[0]
        assert record is not None
        sums = {name: checkpoints.file_checksum(folder / name)}
        marked = record.record.model_copy(update={"checksums": sums})
        write_record(folder / checkpoints.MARKER_FILE, marked)
    assert checkpoints.latest_checkpoint(paths, verifies=True)[1] == []
    _flip_a_bit(folder / name)
    checkpoint, (note,) = checkpoints.latest_checkpoint(paths, verifies=True)
    assert checkpoint is not None
    assert checkpoint.record.step == 8
    assert note == (
        "checkpoint-12 was damaged (the content of global_step12/shard.pt has changed since it was "
        "saved) and skipped"
    )


def test_latest_checkpoint_of_an_older_version_has_no_checksums(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    _flip_a_bit(write_checkpoint(paths, 8) / "global_step8/shard.pt")
    checkpoint, skipped = checkpoints.latest_checkpoint(paths, verifies=True)
    assert checkpoint is not None
    assert (checkpoint.record.checksums, skipped) == ({}, [])
