"""Finds the newest complete checkpoint of a run, from which it can resume."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash

from hpcft.core.errors import StoreError
from hpcft.core.files import read_record
from hpcft.core.paths import RunPaths
from hpcft.core.records import Checkpoint

MARKER_FILE = "checkpoint.json"
"""Name of the record in a checkpoint's folder that is written last."""
LATEST_FILE = "latest"
"""Name of the file in which DeepSpeed writes the name of its own folder."""
CHECKSUM_THREADS = 4
"""Files that are read at the same time: a parallel file system is faster than one stream."""
_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class CompleteCheckpoint:
    """A checkpoint whose files are all there."""

    folder: Path
    """Folder of the checkpoint."""
    record: Checkpoint
    """The record in its marker file."""


def latest_checkpoint(
    paths: RunPaths, *, verifies: bool = False
) -> tuple[CompleteCheckpoint | None, list[str]]:
    """Returns the newest complete checkpoint, and a sentence for each damaged one that is newer.

    Args:
        paths: the run's files.
        verifies: whether to read all of its files and compare their checksums, not only their
            sizes.
    """
    skipped: list[str] = []
    for folder in sorted(checkpoint_folders(paths), key=checkpoint_step, reverse=True):
        try:
            checkpoint = CompleteCheckpoint(folder, _read_complete(folder))
            if verifies:
                check_contents(checkpoint)
            return checkpoint, skipped
        except StoreError as error:
            skipped.append(f"{folder.name} was damaged ({error}) and skipped")
    return None, skipped


def checkpoint_folders(paths: RunPaths) -> Iterator[Path]:
    """Lists the published checkpoints, complete or not."""
    for folder in paths.checkpoints.glob("checkpoint-*"):
        if folder.name.removeprefix("checkpoint-").isdecimal():
            yield folder


def checkpoint_step(folder: Path) -> int:
    """Returns the optimizer step in a checkpoint's name."""
    return int(folder.name.removeprefix("checkpoint-"))


def file_checksum(file: Path) -> str:
    """Returns the XXH3 checksum of a file's content, as hex digits."""
    checksum = xxhash.xxh3_64()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            checksum.update(chunk)
    return str(checksum.hexdigest())


def check_contents(checkpoint: CompleteCheckpoint) -> None:
    """Compares the checksums of a checkpoint's files with those in its marker.

    Checkpoints of older versions have no checksums: their sizes have to do.

    Raises:
        StoreError: a file has changed since it was saved, or cannot be read.
    """
    folder, checksums = checkpoint.folder, checkpoint.record.checksums
    with ThreadPoolExecutor(CHECKSUM_THREADS) as pool:
        try:
            found = [*pool.map(file_checksum, (folder / name for name in checksums))]
        except OSError as error:
            raise StoreError(f"{error.filename}: cannot be read: {error.strerror}") from None
    for (name, expected), actual in zip(checksums.items(), found, strict=True):
        if actual != expected:
            raise StoreError(f"the content of {name} has changed since it was saved")


def _read_complete(folder: Path) -> Checkpoint:
    """Reads a checkpoint's record and checks that all its files are there.

    Raises:
        StoreError: the checkpoint is not complete; the text says what is wrong.
    """
    if not (folder / MARKER_FILE).is_file():
        raise StoreError(f"it has no {MARKER_FILE}")
    record = read_record(folder / MARKER_FILE, Checkpoint)
    if record.step != checkpoint_step(folder):
        raise StoreError(f"{MARKER_FILE} is of step {record.step}")
    try:
        for name, size in record.files.items():
            actual = (folder / name).stat().st_size
            if actual != size:
                raise StoreError(f"{name} has {actual:,} of {size:,} bytes")
        tag = (
            (folder / LATEST_FILE).read_text(errors="replace", encoding="utf-8").strip()
            if record.tag
            else ""
        )
    except OSError as error:
        missing = Path(error.filename).relative_to(folder)
        raise StoreError(f"{missing}: {error.strerror}") from None
    if tag != record.tag:
        raise StoreError(f"{LATEST_FILE} names {tag!r} instead of {record.tag!r}")
    return record
