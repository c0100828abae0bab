"""The digest of a large file is computed once, and again as soon as the file may have changed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hpcft.core import disk_cache, file_digests
from hpcft.core.file_digests import CACHED_FROM_BYTES, file_digest

SIZE = CACHED_FROM_BYTES


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Files that were read, in a cache of this test's own; all files count as settled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(file_digests, "SETTLED_NS", -(10**18))
    read: list[Path] = []
    hash_file = file_digests._hash

    def count(file: Path) -> bytes:
        read.append(file)
        return hash_file(file)

    monkeypatch.setattr(file_digests, "_hash", count)
    return read


def forget() -> None:
    """Forgets what this process has seen, as a new one would."""
    disk_cache._in_memory.clear()


def test_file_digest_is_computed_once_for_an_unchanged_large_file(
    tmp_path: Path, hashed: list[Path]
) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"a" * SIZE)
    expected = hashlib.sha256(b"a" * SIZE).digest()
    for _ in range(3):
        forget()
        assert file_digest(file) == expected
    assert hashed == [file]


def _overwrite(file: Path) -> None:
    """Writes other content of the same size and sets the old time."""
    before = file.stat()
    file.write_bytes(b"b" * SIZE)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def _replace(file: Path) -> None:
    """Puts another file of the same size and time in its place."""
    before, other = file.stat(), file.with_name("other")
    other.write_bytes(b"b" * SIZE)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.rename(file)


@pytest.mark.parametrize("change", [_overwrite, _replace])
@pytest.mark.usefixtures("hashed")
def test_file_digest_sees_a_change_that_keeps_size_and_time(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"a" * SIZE)
    before = file_digest(file)
    change(file)
    assert file_digest(file) != before


def test_file_digest_of_a_file_that_was_just_written_is_not_kept(
    tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_digests, "SETTLED_NS", 10**18)
    file = tmp_path / "weights"
    file.write_bytes(b"a" * SIZE)
    assert file_digest(file) == file_digest(file)
    assert hashed == [file, file]
