"""What was computed from a configuration is kept in the user's cache, so that it is paid once."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from hpcft.planning.memory.import_stubs import for_shapes
from hpcft.core.paths import cache_folder
from hpcft.core.records import Method, ModelSpec, Record

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
    with without_collection(), for_shapes():
        made = _read[file] = make()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(made.model_dump_json())
        temporary.replace(file)
    except OSError:
        pass  # a cache that cannot be written costs seconds, not correctness
    return made


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Without Python's collector, which takes a sixth of the time in which libraries are imported.

    While a step is traced it would end tensors at moments of its own, besides.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def content(model: ModelSpec) -> str:
    """The configuration file of a local model, which may change under the same path."""
    return _text(model.path, "config.json")


def adapter_content(method: Method) -> str:
    """That of a local adapter, likewise."""
    return _text(getattr(method, "adapter_path", None), "adapter_config.json")


def _text(folder: str | None, name: str) -> str:
    file = Path(folder or "") / name
    return file.read_text() if folder and file.is_file() else ""
