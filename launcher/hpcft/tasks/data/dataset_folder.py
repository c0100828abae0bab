"""Reads the rows of a data set folder, without network and without writing anything.

The files are read by `file_readers`, as if the recipe named each of them: so a file has one
meaning. Only which files belong to a split is asked of `datasets`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from hpcft.core.errors import DataError, first_line
from hpcft.tasks.data.arrow_rows import ClassNames, name_classes
from hpcft.tasks.data.class_values import are_numbers
from hpcft.tasks.data.file_readers import data_format, format_names, read_file

DATASET_INFO = "dataset_info.json"
SAVED_SPLITS = "dataset_dict.json"
SAVED_STATE = "state.json"
CARDS = ("README.md", ".huggingface.yaml")
# Fields of a configuration in a README that say where the files are, and not how to read them.
PLACE_FIELDS = {"name", "version", "data_dir", "data_files", "description", "features"}
DELIMITERS = ("sep", "delimiter")


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
        DataError: it cannot be read, has no such split, or names files outside it.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder")
    try:
        splits = {split: prepared_files(folder, split)} if (folder / DATASET_INFO).is_file() else {}
        names: ClassNames = {}
        delimiter = None
        if not splits.get(split):
            splits = _saved_files(folder)
        if not splits:
            splits, names, delimiter = _described_files(folder, name)
    except (OSError, ValueError, RuntimeError, LookupError, TypeError) as error:
        reason = first_line(error)
        raise DataError(f"data set {folder} ({split}) cannot be read: {reason}") from None
    if split not in splits:
        raise DataError(f"{folder}: has no split {split}; it has {', '.join(splits)}")
    for file in splits[split]:
        _check_inside(folder, file)
        for _, row in read_file(file, delimiter):
            yield name_classes(row, names)


def _saved_files(folder: Path) -> dict[str, list[Path]]:
    """Returns the files that `save_to_disk` wrote, by split; nothing if it wrote none here.

    Raises:
        OSError, ValueError, LookupError, TypeError: its lists of files are missing or damaged.
    """
    if (folder / SAVED_SPLITS).is_file():
        names = json.loads((folder / SAVED_SPLITS).read_text(encoding="utf-8"))["splits"]
        return {name: _state_files(folder / name) for name in names}
    return {"train": _state_files(folder)} if (folder / SAVED_STATE).is_file() else {}


def _state_files(folder: Path) -> list[Path]:
    state = json.loads((folder / SAVED_STATE).read_text(encoding="utf-8"))
    return [folder / file["filename"] for file in state["_data_files"]]


def _described_files(
    folder: Path, name: str | None
) -> tuple[dict[str, list[Path]], ClassNames, str | None]:
    """Returns the data files of a folder as on the hub.

    Args:
        folder: the folder.
        name: configuration, where the folder has several.

    Returns:
        Files by split, class names of the columns that the README declares, and the character
        between the cells of a line, if it is not that of the files' format.

    Raises:
        DataError: it names files outside it, or options and formats that hpcft does not read.
        ValueError, OSError, RuntimeError: `datasets` does not find data in it.
    """
    import datasets

    _check_cards(folder)
    builder = datasets.load_dataset_builder(str(folder), name)
    splits = {str(split): [Path(f) for f in fs] for split, fs in builder.config.data_files.items()}
    for file in (file for files in splits.values() for file in files):
        if data_format(file) is None:
            fix = "convert it, or save the data set with save_to_disk"
            raise DataError(f"{file}: expected a file of {format_names()}; {fix}")
    return splits, declared_classes(builder), set_delimiter(folder, builder.config)


def declared_classes(builder: Any) -> dict[str, list[str]]:
    """Returns the class names of the columns that the README of a data set declares.

    Args:
        builder: the `datasets.DatasetBuilder` of the data set.
    """
    import datasets

    names = {
        column: [str(name) for name in feature.names]  # YAML makes numbers of some
        for column, feature in (builder.info.features or {}).items()
        if isinstance(feature, datasets.ClassLabel)
    }
    return {column: classes for column, classes in names.items() if not are_numbers(classes)}


def set_delimiter(folder: Path, config: Any) -> str | None:
    """Returns the delimiter that a README sets; None if it sets none.

    Args:
        folder: folder of the data set, for messages.
        config: the `datasets.BuilderConfig` that follows from the README.

    Raises:
        DataError: the README sets another option of the reader.
    """
    usual = type(config)()
    changed = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in PLACE_FIELDS
        and getattr(config, field.name) != getattr(usual, field.name)
    }
    others = sorted(set(changed) - set(DELIMITERS))
    if others:
        raise DataError(
            f"{folder}: its README sets {', '.join(others)} for reading the files, which hpcft "
            "does not know; convert the files, or save the data set with save_to_disk"
        )
    return next((str(changed[key]) for key in DELIMITERS if key in changed), None)


def _check_cards(folder: Path) -> None:
    """Checks that the description of a data set names files in its folder only.

    Others would be read, or fetched from the network, but their content would not be part of the
    run's id.

    Raises:
        DataError: it names a URL or a file outside the folder.
    """
    for card in CARDS:
        for text in _named_places(folder / card):
            is_url = "://" in text or "::" in text
            if is_url or text.startswith(("/", "~")) or ".." in PurePosixPath(text).parts:
                what = "a URL" if is_url else "a file outside the folder"
                raise DataError(
                    f"{folder / card}: names {what} ({text}), which would not be part of the run's "
                    "identity; copy it into the folder and name the copy"
                )


def _named_places(card: Path) -> Iterator[str]:
    """Yields the paths and patterns of files that a description has."""
    from huggingface_hub import DatasetCard
    from ruamel.yaml import YAML

    if not card.is_file():
        return
    if card.suffix == ".md":
        content = DatasetCard.load(card).data.to_dict()
    else:
        content = YAML(typ="safe").load(card.read_text(encoding="utf-8")) or {}
    for config in content.get("configs") or []:
        yield from _texts(config.get("data_files"))
        yield from _texts(config.get("data_dir"))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)


def _check_inside(folder: Path, file: Path) -> None:
    """Checks that a file lies in a folder, not behind a link to another one.

    Raises:
        DataError: it does not, so that its content would not be part of the run's id.
    """
    inside = next((file.relative_to(f) for f in (folder, folder.resolve())
                   if file.is_relative_to(f)), None)  # fmt: skip
    parents = [folder / part for part in inside.parents][:-1] if inside else []
    if inside is None or ".." in inside.parts or any(parent.is_symlink() for parent in parents):
        raise DataError(
            f"{file}: lies outside {folder}, so that its content would not be part of the run's "
            "identity; copy it into the folder"
        )
