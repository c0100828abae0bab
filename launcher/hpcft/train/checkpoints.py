"""Which checkpoint a run that starts goes on from, and what an interrupted start left behind."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpcft.errors import StoreError
from hpcft.paths import RunPaths
from hpcft.records import Checkpoint
from hpcft.store import read, write_text

log = logging.getLogger(__name__)

MARK = "checkpoint.json"
"""Name of the record that is written last into a checkpoint's folder."""
LATEST = "latest"
"""Name of the file in which DeepSpeed notes the folder of its part."""
KEPT_KINDS = ("rung", "recovery")
"""Lines of metrics.jsonl that tell of the run, not of its steps."""


@dataclass(frozen=True)
class Found:
    """A complete checkpoint."""

    folder: Path
    """Where it is."""
    record: Checkpoint
    """What it says of itself."""


def latest(paths: RunPaths) -> tuple[Found | None, list[str]]:
    """The newest complete checkpoint, and a sentence for each newer one that is not complete."""
    skipped: list[str] = []
    for folder in sorted(folders(paths), key=step_of, reverse=True):
        try:
            return Found(folder, _checked(folder)), skipped
        except StoreError as error:
            skipped.append(f"{folder.name} was damaged ({error}) and skipped")
    return None, skipped


def folders(paths: RunPaths) -> Iterator[Path]:
    """The published checkpoints, complete or not."""
    for folder in paths.checkpoints.glob("checkpoint-*"):
        if folder.name.removeprefix("checkpoint-").isdecimal():
            yield folder


def step_of(folder: Path) -> int:
    """The step that a published checkpoint is of, as its name says."""
    return int(folder.name.removeprefix("checkpoint-"))


def _checked(folder: Path) -> Checkpoint:
    """The record of a checkpoint that is complete.

    Raises:
        StoreError: it is not; says what is wrong.
    """
    if not (folder / MARK).is_file():
        raise StoreError(f"it has no {MARK}")
    record = read(folder / MARK, Checkpoint)
    if record.step != step_of(folder):
        raise StoreError(f"{MARK} is of step {record.step}")
    try:
        for name, size in record.files.items():
            found = (folder / name).stat().st_size
            if found != size:
                raise StoreError(f"{name} has {found:,} of {size:,} bytes")
        named = (folder / LATEST).read_text(errors="replace").strip() if record.tag else ""
    except OSError as error:
        missing = Path(error.filename).relative_to(folder)
        raise StoreError(f"{missing}: {error.strerror}") from None
    if named != record.tag:
        raise StoreError(f"{LATEST} names {named!r} instead of {record.tag!r}")
    return record


def remove_unfinished(paths: RunPaths) -> None:
    """Removes checkpoints that were being written when their process ended."""
    for folder in paths.checkpoints.glob(".*"):
        shutil.rmtree(folder, ignore_errors=True)


def cut_metrics(paths: RunPaths, size: int) -> None:
    """Removes from metrics.jsonl what comes after its first bytes: those steps are done again."""
    if not paths.metrics.exists():
        return
    content = paths.metrics.read_bytes()
    kept = [line for line in content[size:].splitlines() if _kind(line) in KEPT_KINDS]
    after = content[:size] + b"".join(line + b"\n" for line in kept)
    if after != content:
        write_text(paths.metrics, after.decode(errors="replace"))


def _kind(line: bytes) -> object:
    try:
        return json.loads(line).get("kind")
    except (ValueError, AttributeError):
        return None  # the process was killed while it wrote


def rotate(paths: RunPaths, now: int, best: str | None, kept: int | None) -> None:
    """Removes the checkpoints that nothing needs any more.

    Args:
        paths: the run.
        now: step of the newest, which stays.
        best: folder of the best, which stays.
        kept: `train.save_total_limit`: the last so many that the recipe asked for stay.
    """
    stay = 0
    for folder in sorted(folders(paths), key=step_of, reverse=True):
        step = step_of(folder)
        needed = step == now or str(folder) == best
        if needed or (step < now and _was_asked(folder) and (kept is None or stay < kept)):
            stay += 1
        else:
            shutil.rmtree(folder, ignore_errors=True)


def remove_recoveries(paths: RunPaths) -> None:
    """Removes the checkpoints of a run that is done, other than those that its recipe asked for."""
    remove_unfinished(paths)
    for folder in folders(paths):
        if not _was_asked(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _was_asked(folder: Path) -> bool:
    try:
        return read(folder / MARK, Checkpoint).asked
    except StoreError:
        return False
