"""Caches records that depend on a configuration alone in the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from hpcft.core.files import write_text
from hpcft.core.paths import cache_folder
from hpcft.core.records import Record

T = TypeVar("T", bound=Record)

_in_memory: dict[Path, Record] = {}


def load_or_compute(folder: str, key: str, kind: type[T], compute: Callable[[], T]) -> T:
    """Returns the record that is cached under a key; computes and caches it if there is none.

    Args:
        folder: folder inside the cache folder.
        key: text of everything that the record depends on.
        kind: type of the record.
        compute: computes the record.
    """
    name = hashlib.sha256(key.encode()).hexdigest()[:24]
    file = cache_folder() / folder / f"{name}.json"
    record = _in_memory.get(file)
    if isinstance(record, kind):
        return record
    try:
        loaded = _in_memory[file] = kind.model_validate_json(file.read_text(encoding="utf-8"))
        return loaded
    except (OSError, ValueError):
        pass  # The file is missing, or is from a version with other fields.
    computed = _in_memory[file] = compute()
    # A cache that cannot be written costs seconds, not correctness.
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, computed.model_dump_json())
    return computed
