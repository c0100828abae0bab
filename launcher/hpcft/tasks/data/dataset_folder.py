"""Rows of a data set in a folder, whatever wrote it; reads with no network and writes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpcft.core.errors import DataError

PREPARED = "dataset_info.json"


def prepared_files(folder: Path, split: str) -> list[Path]:
    """Tables of a split as `datasets` prepared them in its cache, in their order.

    They are called `<data set>-<split>.arrow` or `<data set>-<split>-00000-of-00002.arrow`; the
    name of a split has no `-`.
    """
    shards = sorted(folder.glob(f"*-{split}-[0-9]*-of-[0-9]*.arrow"))
    return [*folder.glob(f"*-{split}.arrow"), *shards]


def prepared_rows(folder: Path) -> dict[str, int]:
    """Rows of each split of a data set as `datasets` prepared it; empty for other folders."""
    try:
        splits = json.loads((folder / PREPARED).read_text())["splits"]
        return {name: int(found["num_examples"]) for name, found in splits.items()}
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return {}


def read_folder(folder: Path, name: str | None, split: str) -> Iterator[dict[str, Any]]:
    """Rows of a split of the data set in a folder.

    The folder holds data files as a repository of the hub does (CSV, JSON, Parquet, …, with or
    without a README that describes them), what `save_to_disk` wrote, or a data set as `datasets`
    prepared it in its cache.

    Args:
        folder: the folder.
        name: configuration, where the folder has several.
        split: one split.

    Raises:
        DataError: it cannot be read, or has no such split.
    """
    import datasets
    import pyarrow

    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder")
    try:
        if (folder / PREPARED).is_file() and (files := prepared_files(folder, split)):
            for file in files:
                yield from datasets.Dataset.from_file(str(file))
        elif (folder / "dataset_dict.json").is_file():
            yield from _split_of(datasets.load_from_disk(folder), folder, split)
        elif (folder / "state.json").is_file():
            yield from _split_of({"train": datasets.load_from_disk(folder)}, folder, split)
        else:
            # Streamed: loading would first write a copy into the cache, which a compute node
            # may not be able to write to.
            loaded = datasets.load_dataset(str(folder), name, streaming=True)
            yield from _split_of(loaded, folder, split)
    except (OSError, ValueError, RuntimeError, pyarrow.ArrowException) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"data set {folder} ({split}): {first}") from None


def _split_of(splits: Any, folder: Path, split: str) -> Any:
    if split not in splits:
        raise DataError(f"{folder}: has no split {split}; it has {', '.join(splits)}")
    return splits[split]
