"""Reads and writes the error file of each rank."""

from __future__ import annotations

import logging
from pathlib import Path

from hpcft.core.errors import StoreError
from hpcft.core.files import read_record, write_record
from hpcft.core.paths import RunPaths
from hpcft.core.records import RankError

log = logging.getLogger(__name__)


def read_rank_errors(paths: RunPaths) -> list[RankError]:
    """Reads the errors that ranks wrote, the earliest first; skips files that are damaged.

    The earliest is usually the cause: other ranks fail because the first one is gone.
    """
    errors = []
    for file in paths.errors.glob("*.json") if paths.errors.is_dir() else ():
        try:
            errors.append(read_record(file, RankError))
        except StoreError:
            continue
    return sorted(errors, key=lambda error: error.at)


def write_rank_error(paths: RunPaths, error: RankError) -> None:
    """Writes a rank's error file; replaces an earlier one of the same rank.

    If the file cannot be written, the log gets the error, because the run folder's file system may
    be what failed.
    """
    try:
        paths.errors.mkdir(mode=0o700, exist_ok=True)
        write_record(rank_error_file(paths, error.rank), error)
    except OSError as failed:
        log.error(
            "%s: %s (its error file cannot be written: %s)", error.kind, error.message, failed
        )


def rank_error_file(paths: RunPaths, rank: int) -> Path:
    """Returns the path of a rank's error file."""
    return paths.errors / f"{rank}.json"
