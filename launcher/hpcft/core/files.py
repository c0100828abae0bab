"""Run folders: created private, read with care, written atomically, locked while they change."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from pydantic import ValidationError

from hpcft import __version__
from hpcft.core.errors import StoreError
from hpcft.core.records import Record, StoredRecord

R = TypeVar("R", bound=Record)
MAX_RECORD_BYTES = 20_000_000
LOCK = ".lock"


def check_path(folder: Path) -> None:
    """Refuses a path that Slurm or a shell would read as something else."""
    if any(mark in str(folder) for mark in ("%", "\n", "\r", "\0")):
        raise StoreError(
            f"{folder!s}: a runs folder may not have % or line breaks in its path "
            "(Slurm replaces %j and the like in file names)"
        )


def create_folder(folder: Path) -> None:
    """Makes a folder of mode 0700, parents as the umask says.

    Raises:
        StoreError: it exists and others may write to it, or it cannot be made.
    """
    check_path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{folder}: cannot be made: {error.strerror}") from None
    check_private(folder)


def check_private(folder: Path) -> None:
    """Refuses a run folder that others may write to: what it holds would run in your name."""
    try:
        info = folder.stat()
    except OSError as error:
        raise StoreError(f"{folder}: {error.strerror}") from None
    if info.st_uid not in (os.getuid(), 0) or stat.S_IMODE(info.st_mode) & 0o022:
        raise StoreError(f"{folder}: others may write to it; chmod 700 it if its content is yours")


def write_text(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old or the new text, never a part.

    Raises:
        OSError: it cannot be written (no room, no permission); names the file.
    """
    name = ""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
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
    """Writes a record whole unless the file is there; whether it was this call that wrote it."""
    aside = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    write_record(aside, record)
    try:
        os.link(aside, path)  # of several writers exactly one succeeds, on a network too
    except FileExistsError:
        return False
    finally:
        aside.unlink()
    return True


def write_json(path: Path, value: object) -> None:
    """Writes plain JSON for people, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def open_file(path: Path) -> BinaryIO:
    """A file of a run folder to read; a pipe or device in its place is not waited for.

    Raises:
        OSError: it is missing, may not be read, or is no file.
    """
    stream = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise OSError(errno.EINVAL, "is no file", str(path))
    return stream


def file_age_s(file: Path) -> float:
    """Seconds since a file was written, by the clock of its file system.

    A heartbeat's own time is of another machine, whose clock may be ahead or behind.

    Raises:
        OSError: there is no such file.
    """
    written = file.stat().st_mtime
    try:
        with tempfile.TemporaryFile(dir=file.parent) as now:
            return os.fstat(now.fileno()).st_mtime - written
    except OSError:
        return time.time() - written  # a folder that only the run can write to


def read_record(path: Path, kind: type[R]) -> R:
    """Reads a record that hpcft wrote; fields that it does not know are left out.

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
        # Recipes and profiles are closed where people write them; their copies here are not.
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
    """The record in a file, or None where there is no such file."""
    try:
        path.lstat()
    except FileNotFoundError:
        return None
    except OSError:
        pass  # reading says why
    return read_record(path, kind)


@contextlib.contextmanager
def lock_folder(root: Path) -> Iterator[None]:
    """Holds the runs folder's lock, so that of two submissions at once one waits for the other.

    Raises:
        StoreError: the folder is not there and cannot be made, or its file system has no locks.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / LOCK).open("a")
    except OSError as error:
        raise StoreError(f"{root}: cannot be made: {error.strerror}") from None
    with lock as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            raise StoreError(
                f"{root / LOCK}: cannot be locked: {error.strerror}; two submissions at once could "
                "not be told apart: choose a runs folder on another file system (--runs-dir)"
            ) from None
        yield


def is_locked(root: Path) -> bool:
    """Whether another command holds the runs folder's lock."""
    try:
        with (root / LOCK).open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # nobody has ever locked it, or nobody can
    return False
