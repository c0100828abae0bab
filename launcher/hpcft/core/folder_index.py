"""Index of run folders: texts that were made from their files, to read those of many runs at once.

The run folders are the truth. A text counts only as long as the files of its run have the sizes,
times and inodes that they had when it was made. The index may be deleted at any time; if it is
damaged, missing, or of another hpcft, commands read the folders, and write it again.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hpcft import __version__

if TYPE_CHECKING:
    import sqlite3

T = TypeVar("T")

INDEX_FILE = ".index.sqlite"
MIN_RUNS = 100
"""Fewest finished runs that are indexed: fewer are read as quickly from their folders."""
SETTLED_S = 2.0
"""Age in seconds from which a file counts as settled: a second write within a tick of the file
system's clock would leave its time as it was."""
BUSY_TIMEOUT_S = 1.0
"""Seconds to wait for another command that writes the index."""

RUN_FILES = ("result.json", "job.json", "progress.json", "plan.json", "current_plan.json",
             "recoveries")  # fmt: skip
"""Files of a run folder that its status is read from."""


def signature(folder: str, names: Sequence[str] = RUN_FILES) -> str:
    """Returns what tells that files of a run folder are still the same; empty without the first.

    Args:
        folder: the folder; not a Path, because this is called for thousands.
        names: names of files, and of folders of files.
    """
    parts: list[object] = [__version__]
    for name in names:
        try:
            info = os.stat(f"{folder}/{name}")
        except OSError:
            if name == names[0]:
                return ""
            parts.append(name)
            continue
        parts += (info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino)
        if stat.S_ISDIR(info.st_mode):
            parts += _signatures_in(f"{folder}/{name}")
    return str(parts)


def _signatures_in(folder: str) -> list[str]:
    try:
        return [signature(folder, [name]) for name in sorted(os.listdir(folder))]
    except OSError:
        return [str(time.time())]  # It is never the same.


def is_settled(folder: str, names: Sequence[str] = RUN_FILES) -> bool:
    """Returns whether a change of files of a run folder from now on shows in their signature."""
    files = [f"{folder}/{name}" for name in names]
    with contextlib.suppress(OSError):
        files += [entry.path for file in files if os.path.isdir(file) for entry in os.scandir(file)]
    newest = 0.0
    for file in files:
        with contextlib.suppress(OSError):
            info = os.stat(file)
            newest = max(newest, info.st_mtime, info.st_ctime)
    return newest < time.time() - SETTLED_S


def load(root: Path, kind: str) -> dict[str, tuple[str, str]]:
    """Returns the signature and the text of each run folder, by `recipe/run id`.

    Args:
        root: the runs folder.
        kind: what the texts are of: each kind has one for each run.
    """
    if not _is_own(root / INDEX_FILE):
        return {}
    query = "SELECT folder, signature, text, checksum FROM texts WHERE kind = ?"

    def read(connection: sqlite3.Connection) -> dict[str, tuple[str, str]]:
        return {
            folder: (signature, text)
            for folder, signature, text, checksum in connection.execute(query, (kind,))
            if checksum == _checksum(folder, signature, text)
        }

    return _in_index(root, read) or {}


def store(root: Path, kind: str, texts: Mapping[str, tuple[str, str]]) -> None:
    """Writes texts into the index, if it can be written.

    Args:
        root: the runs folder.
        kind: what they are of.
        texts: signature and text of run folders, by `recipe/run id`.
    """
    file = root / INDEX_FILE
    if not _is_own(file):
        with contextlib.suppress(OSError):
            # Others may not read it, as little as the run folders.
            os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW, 0o600))
        if not _is_own(file):
            return
    rows = [
        (kind, folder, signature, text, _checksum(folder, signature, text))
        for folder, (signature, text) in texts.items()
    ]

    def write(connection: sqlite3.Connection) -> None:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS texts (kind TEXT, folder TEXT, signature TEXT, text TEXT, "
            "checksum INTEGER, PRIMARY KEY (kind, folder))"
        )
        connection.executemany("INSERT OR REPLACE INTO texts VALUES (?, ?, ?, ?, ?)", rows)

    _in_index(root, write)


def remove(root: Path, folders: Collection[str]) -> None:
    """Removes the texts of run folders that are gone."""

    def delete(connection: sqlite3.Connection) -> None:
        rows = [(folder,) for folder in folders]
        connection.executemany("DELETE FROM texts WHERE folder = ?", rows)

    _in_index(root, delete)


def _checksum(*texts: str) -> int:
    """Returns a checksum of texts: SQLite itself would not notice another digit."""
    return zlib.crc32("\0".join(texts).encode(errors="surrogatepass"))


def _is_own(file: Path) -> bool:
    """Returns whether a file is there, and nobody else may write to it."""
    try:
        info = file.lstat()
    except OSError:
        return False
    is_private = info.st_uid == os.getuid() and not stat.S_IMODE(info.st_mode) & 0o022
    return stat.S_ISREG(info.st_mode) and is_private


def _in_index(root: Path, action: Callable[[sqlite3.Connection], T]) -> T | None:
    """Returns what a function makes of the index, in a transaction; None if that goes wrong.

    Whatever goes wrong, commands do without the index. A damaged one is deleted; one that another
    command writes to, or that may not be written, is left alone.
    """
    import sqlite3  # Imported here: only commands that list runs need it.

    file = root / INDEX_FILE
    try:
        connection = sqlite3.connect(file, timeout=BUSY_TIMEOUT_S)
        with contextlib.closing(connection), connection:
            return action(connection)
    except sqlite3.OperationalError as error:
        is_of_another_form = "no such" in str(error) or "columns" in str(error)
    except (sqlite3.Error, UnicodeError, TypeError, ValueError):
        is_of_another_form = True
    except OSError:
        is_of_another_form = False
    if is_of_another_form:
        with contextlib.suppress(OSError):
            file.unlink()
    return None
