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
    """What ranks wrote about their own end, the earliest first: the others only followed it."""
    found = []
    for file in paths.errors.glob("*.json") if paths.errors.is_dir() else ():
        try:
            found.append(read_record(file, RankError))
        except StoreError:
            continue
    return sorted(found, key=lambda error: error.at)


def write_rank_error(paths: RunPaths, error: RankError) -> None:
    """Writes down what a rank says about its end, in the place of what it said before.

    Where that cannot be, for the folder may be what failed, the log says both.
    """
    try:
        paths.errors.mkdir(mode=0o700, exist_ok=True)
        write_record(rank_error_file(paths, error.rank), error)
    except OSError as failed:
        log.error("%s: %s (not noted: %s)", error.kind, error.message, failed)


def rank_error_file(paths: RunPaths, rank: int) -> Path:
    """Where a rank says why it ended."""
    return paths.errors / f"{rank}.json"
