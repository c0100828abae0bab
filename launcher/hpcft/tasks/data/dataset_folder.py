"""Reads the rows of a data set folder, without network and without writing anything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpcft.core.errors import DataError, first_line

DATASET_INFO = "dataset_info.json"


def prepared_files(folder: Path, split: str) -> list[Path]:
    """Returns the Arrow files of a split in the cache of `datasets`, in their order.

    They are called `<data set>-<split>.arrow` or `<data set>-<split>-00000-of-00002.arrow`; the
    name of a split has no `-`.
    """
    shards = sorted(folder.glob(f"*-{split}-[0-9]*-of-[0-9]*.arrow"))
    return [*folder.glob(f"*-{split}.arrow"), *shards]


def prepared_rows(folder: Path) -> dict[str, int]:
    """Returns the number of rows of each split in the cache of `datasets`; else nothing."""
    try:
        splits = json.loads((folder / DATASET_INFO).read_text(encoding="utf-8"))["splits"]
        return {name: int(split["num_examples"]) for name, split in splits.items()}
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return {}


def read_folder(folder: Path, name: str | None, split: str) -> Iterator[dict[str, Any]]:
    """Reads the rows of a split of the data set in a folder.

    The folder holds data files as a repository of the hub does (CSV, JSON, Parquet, …, with or
    without a README that describes them), the output of `save_to_disk`, or a data set in the cache
    of `datasets`.

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
        if (folder / DATASET_INFO).is_file() and (files := prepared_files(folder, split)):
            for file in files:
                yield from datasets.Dataset.from_file(str(file))
        elif (folder / "dataset_dict.json").is_file():
            yield from _select_split(datasets.load_from_disk(folder), folder, split)
        elif (folder / "state.json").is_file():
            yield from _select_split({"train": datasets.load_from_disk(folder)}, folder, split)
        else:
            # Streaming avoids a copy in the cache, which a compute node may not be able to write.
            splits = datasets.load_dataset(str(folder), name, streaming=True)
            yield from _select_split(splits, folder, split)
    except (OSError, ValueError, RuntimeError, pyarrow.ArrowException) as error:
        reason = first_line(error)
        raise DataError(f"data set {folder} ({split}) cannot be read: {reason}") from None


def _select_split(splits: Any, folder: Path, split: str) -> Any:
    if split not in splits:
        raise DataError(f"{folder}: has no split {split}; it has {', '.join(splits)}")
    return splits[split]
