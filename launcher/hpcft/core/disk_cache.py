"""What was computed from a configuration is kept in the user's cache, so that it is paid once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from hpcft.core.paths import cache_folder
from hpcft.core.records import Record

T = TypeVar("T", bound=Record)

_read: dict[Path, Record] = {}


def cached(folder: str, key: str, kind: type[T], make: Callable[[], T]) -> T:
    """The record that was kept under the key, else a new one, kept from now on.

    Args:
        folder: folder of the cache.
        key: everything that the record depends on.
        kind: type of the record.
        make: computes it.
    """
    name = hashlib.sha256(key.encode()).hexdigest()[:24]
    file = cache_folder() / folder / f"{name}.json"
    known = _read.get(file)
    if isinstance(known, kind):
        return known
    try:
        found = _read[file] = kind.model_validate_json(file.read_text())
        return found
    except (OSError, ValueError):
        pass
    made = _read[file] = make()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(made.model_dump_json())
        temporary.replace(file)
    except OSError:
        pass  # a cache that cannot be written costs seconds, not correctness
    return made
