"""The checkpoints of a run, as far as they are complete: what it would go on from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpcft.core.errors import StoreError
from hpcft.core.files import read_record
from hpcft.core.paths import RunPaths
from hpcft.core.records import Checkpoint

MARKER_FILE = "checkpoint.json"
"""Name of the record that is written last into a checkpoint's folder."""
LATEST_FILE = "latest"
"""Name of the file in which DeepSpeed notes the folder of its part."""


@dataclass(frozen=True)
class CompleteCheckpoint:
    """A complete checkpoint."""

    folder: Path
    """Where it is."""
    record: Checkpoint
    """What it says of itself."""


def latest_checkpoint(paths: RunPaths) -> tuple[CompleteCheckpoint | None, list[str]]:
    """The newest complete checkpoint, and a sentence for each newer one that is not complete."""
    skipped: list[str] = []
    for folder in sorted(checkpoint_folders(paths), key=checkpoint_step, reverse=True):
        try:
            return CompleteCheckpoint(folder, _checked(folder)), skipped
        except StoreError as error:
            skipped.append(f"{folder.name} was damaged ({error}) and skipped")
    return None, skipped


def checkpoint_folders(paths: RunPaths) -> Iterator[Path]:
    """The published checkpoints, complete or not."""
    for folder in paths.checkpoints.glob("checkpoint-*"):
        if folder.name.removeprefix("checkpoint-").isdecimal():
            yield folder


def checkpoint_step(folder: Path) -> int:
    """The step that a published checkpoint is of, as its name says."""
    return int(folder.name.removeprefix("checkpoint-"))


def _checked(folder: Path) -> Checkpoint:
    """The record of a checkpoint that is complete.

    Raises:
        StoreError: it is not; says what is wrong.
    """
    if not (folder / MARKER_FILE).is_file():
        raise StoreError(f"it has no {MARKER_FILE}")
    record = read_record(folder / MARKER_FILE, Checkpoint)
    if record.step != checkpoint_step(folder):
        raise StoreError(f"{MARKER_FILE} is of step {record.step}")
    try:
        for name, size in record.files.items():
            found = (folder / name).stat().st_size
            if found != size:
                raise StoreError(f"{name} has {found:,} of {size:,} bytes")
        named = (folder / LATEST_FILE).read_text(errors="replace").strip() if record.tag else ""
    except OSError as error:
        missing = Path(error.filename).relative_to(folder)
        raise StoreError(f"{missing}: {error.strerror}") from None
    if named != record.tag:
        raise StoreError(f"{LATEST_FILE} names {named!r} instead of {record.tag!r}")
    return record
