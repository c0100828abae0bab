"""Removes checkpoints: unfinished ones, old ones, and those of a run that is done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from hpcft.core.checkpoints import MARKER_FILE, checkpoint_folders, checkpoint_step
from hpcft.core.errors import StoreError
from hpcft.core.files import read_record, write_text
from hpcft.core.paths import RunPaths
from hpcft.core.records import Checkpoint

KEPT_KINDS = ("recovery", "rung")
"""Kinds of lines in metrics.jsonl about the run, not its steps; the second is hpcft 0.1's."""


def remove_unfinished(paths: RunPaths) -> None:
    """Removes checkpoints whose process ended while it wrote them, and converted ones."""
    # Both are hidden folders; a published checkpoint is not.
    for folder in paths.checkpoints.glob(".*"):
        shutil.rmtree(folder, ignore_errors=True)


def cut_metrics(paths: RunPaths, size: int) -> None:
    """Cuts metrics.jsonl to its first bytes, since later steps are done again.

    Args:
        paths: the run.
        size: bytes to keep; later lines about recoveries are kept too.
    """
    if not paths.metrics.exists():
        return
    content = paths.metrics.read_bytes()
    kept = [line for line in content[size:].splitlines() if _kind(line) in KEPT_KINDS]
    new_content = content[:size] + b"".join(line + b"\n" for line in kept)
    if new_content != content:
        write_text(paths.metrics, new_content.decode(errors="replace"))


def _kind(line: bytes) -> object:
    try:
        return json.loads(line).get("kind")
    except (ValueError, AttributeError):
        return None  # The process was killed while it wrote the line.


def remove_old_checkpoints(
    paths: RunPaths, *, newest_step: int, best_folder: str | None, save_total_limit: int | None
) -> None:
    """Removes the checkpoints that are no longer needed.

    Args:
        paths: the run.
        newest_step: step of the newest checkpoint, which is kept.
        best_folder: folder of the best checkpoint, which is kept.
        save_total_limit: `train.save_total_limit`: number of checkpoints to keep of those that the
            recipe asked for, the newest ones; None keeps all of them.
    """
    kept = 0
    for folder in sorted(checkpoint_folders(paths), key=checkpoint_step, reverse=True):
        step = checkpoint_step(folder)
        is_needed = step == newest_step or str(folder) == best_folder
        has_room = save_total_limit is None or kept < save_total_limit
        if is_needed or (step < newest_step and _is_user_requested(folder) and has_room):
            kept += 1
        else:
            shutil.rmtree(folder, ignore_errors=True)


def remove_resume_checkpoints(paths: RunPaths) -> None:
    """Removes the checkpoints of a completed run, except those that its recipe asked for."""
    remove_unfinished(paths)
    for folder in checkpoint_folders(paths):
        if not _is_user_requested(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_user_requested(folder: Path) -> bool:
    try:
        return read_record(folder / MARKER_FILE, Checkpoint).user_requested
    except StoreError:
        return False
