"""Creates private run folders; reads, writes and locks their files safely."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import getpass
import json
import logging
import os
import shlex
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TextIO, TypeVar

from pydantic import ValidationError

from hpcft import __version__
from hpcft.core.errors import StoreError
from hpcft.core.host import node_name, wait_until
from hpcft.core.permissions import check_private as check_private
from hpcft.core.permissions import other_owner
from hpcft.core.records import Record, StoredRecord

log = logging.getLogger(__name__)

R = TypeVar("R", bound=Record)
T = TypeVar("T")
MAX_RECORD_BYTES = 20_000_000
LOCK_FILE = ".lock"


def check_path(folder: Path) -> None:
    """Refuses a path that Slurm or a shell would change.

    Raises:
        StoreError: the path holds % or a line break.
    """
    if any(mark in str(folder) for mark in ("%", "\n", "\r", "\0")):
        raise StoreError(
            f"{folder!s}: a runs folder may not have % or line breaks in its path "
            "(Slurm replaces %j and the like in file names); choose another one with --runs-dir"
        )


def create_folder(folder: Path) -> None:
    """Creates a folder with mode 0700, and its parents.

    Raises:
        StoreError: others may write to the existing folder, or it cannot be created.
    """
    check_path(folder)
    try:
        make_folder(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{folder}: cannot be created: {error.strerror}") from None
    check_private(folder)


def make_folder(folder: Path) -> None:
    """Creates a folder and its parents, into which only this user may write, whatever the umask.

    Raises:
        OSError: it cannot be created.
    """
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(mode=0o755, exist_ok=True)


# ---------------------------------------------------------------- writing

SYNC_THREADS = 8
"""Files that are brought to disk at a time; a file system writes them in one transaction."""

_unsynced: list[Path] | None = None
"""New files that are not on disk yet; None outside `synced_together`."""


@contextlib.contextmanager
def synced_together() -> Iterator[None]:
    """Brings the new files that are written within it to disk at its end, all at a time.

    A sweep of 1,000 runs writes thousands of files, each of which would wait for the disk alone. A
    file that replaces another one is on disk before it takes its place, as everywhere: after a
    crash of the machine a new file may be empty, and an old one is never lost.

    Raises:
        OSError: a file cannot be written (disk full).
    """
    global _unsynced
    _unsynced = []
    try:
        yield
        files, _unsynced = _unsynced, None
        for_each(_sync, [files[first::SYNC_THREADS] for first in range(SYNC_THREADS)])
    finally:
        _unsynced = None


def for_each(function: Callable[[T], object], items: Sequence[T]) -> None:
    """Calls a function, which waits for the disk, with each item; many at a time.

    Raises:
        Exception: the first one that a call raised.
    """
    if len(items) < 2:
        for item in items:
            function(item)
        return
    # Imported here: most commands start no threads.
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(SYNC_THREADS, len(items))) as pool:
        for _ in pool.map(function, items):
            pass


def _sync(paths: Sequence[Path]) -> None:
    """Brings files to disk; one that was moved since is left out.

    Raises:
        OSError: the disk is full; names the file.
    """
    for path in paths:
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            os.fsync(handle)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
        finally:
            os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically: a reader sees the old or the new text, never a part.

    Raises:
        OSError: the file cannot be written (disk full, no permission); names the file.
    """
    name = ""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            if _unsynced is None or os.path.lexists(path):
                os.fsync(stream.fileno())
            else:
                _unsynced.append(path)
        os.replace(name, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(name)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def write_record(path: Path, record: Record) -> None:
    """Writes a record as JSON, atomically."""
    write_text(path, record.model_dump_json(indent=2) + "\n")


def write_record_once(path: Path, record: Record) -> bool:
    """Writes a record atomically unless the file exists; returns whether this call wrote it."""
    temporary = path.with_name(f".{path.name}.{node_name()}.{os.getpid()}")
    write_record(temporary, record)
    try:
        # Of several writers exactly one creates the link, on a network file system too.
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def write_json(path: Path, value: object) -> None:
    """Writes indented JSON for people, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------- reading


def open_file(path: Path) -> BinaryIO:
    """Opens a file of a run folder for reading; never blocks on a pipe or a device.

    Raises:
        OSError: the file is missing, may not be read, or is not a regular file.
    """
    stream = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return stream


def file_age_s(file: Path) -> float:
    """Returns the seconds since a file was written, by the clock of its file system.

    The time inside a heartbeat is that of another machine, whose clock may differ from ours.

    Raises:
        OSError: the file is missing.
    """
    written = file.stat().st_mtime
    try:
        with tempfile.TemporaryFile(dir=file.parent) as probe:
            return os.fstat(probe.fileno()).st_mtime - written
    except OSError:
        return time.time() - written  # This process may not write into the folder.


def read_record(path: Path, kind: type[R]) -> R:
    """Reads a record that hpcft wrote; ignores fields that this version does not know.

    Raises:
        StoreError: the file is missing, too large, damaged, or written by a newer hpcft in a format
            that this one would misread.
    """
    try:
        with open_file(path) as stream:
            if os.fstat(stream.fileno()).st_size > MAX_RECORD_BYTES:
                raise StoreError(f"{path}: too large for a record; the run folder is damaged")
            text = stream.read()
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        # Recipes and profiles refuse unknown fields where people write them, but not in the copies
        # that a run folder holds: a newer hpcft may have written those.
        record = kind.model_validate_json(text, extra="ignore")
    except ValidationError as error:
        _check_version(path, kind, _version_in(text))
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "document"
        raise StoreError(f"{path}: is damaged ({place}: {first['msg']})") from None
    if isinstance(record, StoredRecord):
        _check_version(path, kind, record.schema_version)
    return record


def _check_version(path: Path, kind: type[Record], version: int) -> None:
    """Refuses a file in a newer format.

    Raises:
        StoreError: the format is newer than `kind` knows.
    """
    if issubclass(kind, StoredRecord) and version > kind.known_version():
        raise StoreError(
            f"{path}: a newer hpcft wrote it (format {version}; this one, {__version__}, reads up "
            f"to {kind.known_version()}): use that hpcft, or upgrade this one"
        )


def _version_in(text: bytes) -> int:
    """Returns the `schema_version` of a file that could not be read otherwise; 0 if it has none."""
    try:
        version = json.loads(text)["schema_version"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return 0
    return version if isinstance(version, int) else 0


def read_record_if_exists(path: Path, kind: type[R]) -> R | None:
    """Reads a record; returns None if there is no such file.

    Raises:
        StoreError: the file exists but cannot be read.
    """
    try:
        path.lstat()
    except FileNotFoundError:
        return None
    except OSError:
        pass  # read_record fails too, and says why.
    return read_record(path, kind)


# ---------------------------------------------------------------- the lock of a runs folder


LOCK_TIMEOUT_S = 300.0
"""Seconds for which a command waits for another one that submits from the same runs folder."""
_LOCK_SILENT_S = 2.0
_LOCK_POLL_S = 0.02


@contextlib.contextmanager
def lock_folder(root: Path, timeout_s: float | None = None) -> Iterator[None]:
    """Holds the lock of a runs folder, so that only one command submits from it at a time.

    Args:
        root: the runs folder.
        timeout_s: longest time to wait for another command, in seconds; by default
            `LOCK_TIMEOUT_S`.

    Raises:
        StoreError: the folder cannot be created, its file system has no locks, or another command
            keeps the lock.
    """
    try:
        make_folder(root)
        lock = (root / LOCK_FILE).open("a+", encoding="utf-8", errors="replace")
    except OSError as error:
        if root.is_dir() and (owner := other_owner(root)):
            raise StoreError(
                f"{root}: belongs to user {owner}: its runs can be read, but runs of your own need "
                "a runs folder of your own: choose one with --runs-dir"
            ) from None
        raise StoreError(f"{root}: cannot be created: {error.strerror}") from None
    with lock as stream:
        try:
            _wait_for_lock(stream, LOCK_TIMEOUT_S if timeout_s is None else timeout_s)
        except OSError as error:
            raise StoreError(
                f"{root / LOCK_FILE}: cannot be locked: {error.strerror}; without a lock, two "
                "submissions at the same time could submit a run twice: choose a runs folder on "
                "another file system with --runs-dir"
            ) from None
        with contextlib.suppress(OSError):  # A full disk does not keep the lock from being held.
            stream.truncate(0)
            stream.write(this_process())
            stream.flush()
        yield


def _wait_for_lock(stream: TextIO, timeout_s: float) -> None:
    """Locks an open file.

    Raises:
        StoreError: another process has not released the lock in time.
        OSError: the file system has no locks.
    """

    def is_mine() -> bool:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def holder() -> str:
        stream.seek(0)
        return stream.read(1000).strip() or "another command"

    silent_s = min(_LOCK_SILENT_S, timeout_s)
    if wait_until(is_mine, silent_s, _LOCK_POLL_S):
        return
    log.warning("%s: waiting for %s", stream.name, holder())
    if not wait_until(is_mine, timeout_s - silent_s, _LOCK_POLL_S):
        raise StoreError(
            f"{stream.name}: still locked after {timeout_s:.0f} s by {holder()}; it may be stopped "
            "(Ctrl-Z) or wait for a file system: continue it or end it, then repeat the command"
        )


def this_process() -> str:
    """Returns command, process, user, machine and time in words, for those who wait for a lock."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200]
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    user = getpass.getuser()
    return f"`{command}` (process {os.getpid()} of {user} on {node_name()}, since {since})"


def is_locked(root: Path) -> bool:
    """Returns whether another command holds the lock of a runs folder."""
    try:
        with (root / LOCK_FILE).open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # The folder was never locked, or its file system has no locks.
    return False
