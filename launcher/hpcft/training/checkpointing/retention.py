"""The checkpoints of a run as it goes on: what is left over is removed, and what is not needed."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from hpcft.core.checkpoints import MARKER_FILE, checkpoint_folders, checkpoint_step
from hpcft.core.errors import StoreError
from hpcft.core.files import read_record, write_text
from hpcft.core.paths import RunPaths
from hpcft.core.records import Checkpoint

log = logging.getLogger(__name__)

# Lines of metrics.jsonl about the run and not its steps; `rung` is what hpcft 0.1 wrote.
KEPT_KINDS = ("recovery", "rung")


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


def remove_old_checkpoints(paths: RunPaths, now: int, best: str | None, kept: int | None) -> None:
    """Removes the checkpoints that nothing needs any more.

    Args:
        paths: the run.
        now: step of the newest, which stays.
        best: folder of the best, which stays.
        kept: `train.save_total_limit`: the last so many that the recipe asked for stay.
    """
    stay = 0
    for folder in sorted(checkpoint_folders(paths), key=checkpoint_step, reverse=True):
        step = checkpoint_step(folder)
        needed = step == now or str(folder) == best
        if needed or (step < now and _was_asked(folder) and (kept is None or stay < kept)):
            stay += 1
        else:
            shutil.rmtree(folder, ignore_errors=True)


def remove_resume_checkpoints(paths: RunPaths) -> None:
    """Removes the checkpoints of a run that is done, other than those that its recipe asked for."""
    remove_unfinished(paths)
    for folder in checkpoint_folders(paths):
        if not _was_asked(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _was_asked(folder: Path) -> bool:
    try:
        return read_record(folder / MARKER_FILE, Checkpoint).user_requested
    except StoreError:
        return False
