"""Hashes whole files; the digest of a large file is kept in the cache while the file is the same.

A file is the same while its path, size, times and inode are: whoever writes to it changes its
`ctime`, which no program can set back.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

from hpcft.core.disk_cache import load_or_compute
from hpcft.core.records import StoredRecord
from hpcft.core.units import MIB

CACHED_FROM_BYTES = 8 * MIB  # smaller files are hashed quicker than they are looked up
SETTLED_NS = 2_000_000_000  # file systems count time in steps of up to two seconds


class FileDigest(StoredRecord):
    """Cache entry: the hash of a file's content."""

    sha256: str
    """SHA-256 of all of the file, as hex digits."""


def file_digest(file: Path) -> bytes:
    """Returns the SHA-256 of the content of a file.

    Raises:
        OSError: it cannot be read.
    """
    info = file.stat()
    is_settled = time.time_ns() - max(info.st_mtime_ns, info.st_ctime_ns) > SETTLED_NS
    if info.st_size < CACHED_FROM_BYTES or not is_settled:
        return _hash(file)
    state = [info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino, info.st_dev]
    key = json.dumps([os.path.realpath(file), *state])
    cached = load_or_compute(
        "digests", key, FileDigest, lambda: FileDigest(sha256=_hash(file).hex())
    )
    return bytes.fromhex(cached.sha256)


def _hash(file: Path) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
