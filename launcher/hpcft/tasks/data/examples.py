"""Rows from files or the hub to checked examples; what is wrong names file, row and field."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcft.core.errors import DataError, Problem
from hpcft.core.records import DataSpec, Split
from hpcft.tasks.base import MAX_PROBLEMS, BadRow, Example, TaskBase, rows_error, shorten_list
from hpcft.tasks.data.dataset_folder import read_folder
from hpcft.tasks.data.file_readers import read_file

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass
class Examples:
    """The checked examples of a run."""

    splits: dict[str, list[Example]]
    """Our split to its examples."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the result should know, for example rows left out."""


def split_sources(data: DataSpec) -> dict[str, str]:
    """Where each split is read from: a file, or a split of the hub data set.

    A hub data set has the splits that `splits` lists; without it, the usual three, or for
    `fractions` the one to cut up.
    """
    if data.files is not None:
        named = dict(data.files)
    else:
        named = dict(data.splits) or {s: s for s in (SPLITS[:1] if data.fractions else SPLITS)}
    return {split: named[split] for split in SPLITS if split in named}


def read_splits(data: DataSpec, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a split of the data set in a folder, or of several, joined with `+`.

    Raises:
        DataError: it cannot be read.
    """
    for part in split.split("+"):
        yield from enumerate(read_folder(Path(data.path or ""), data.name, part.strip()), 1)


def load_examples(task: TaskBase) -> Examples:
    """The examples of every split: read, checked, cut into fractions, sampled and limited.

    Raises:
        InputError: rows that the task cannot use, each with file, line and field.
        DataError: a file or data set that cannot be read.
    """
    data = task.data
    notes: list[str] = []
    problems: list[Problem] = []
    loaded: dict[str, list[Example]] = {}
    for split, name in split_sources(data).items():
        if data.files is not None:
            source, rows = name, read_file(Path(name))
        else:
            source, rows = f"{data.path}[{name}]", read_splits(data, name)
        examples, dropped = _check(task, source, rows, problems)
        if dropped:
            notes.append(f"{split}: {dropped} rows with empty text left out")
        if not examples and not problems:
            raise DataError(f"{source}: has no rows" + (" with text" if dropped else ""))
        loaded[split] = examples if problems else task.group_examples(examples)
        if not loaded[split] and not problems:
            raise DataError(f"{source}: {len(examples)} rows are too few for one example")
    if problems:
        raise rows_error(problems)
    if data.fractions is not None:
        loaded = _cut(loaded, data)
    return Examples({s: _sampled(s, rows, data, notes) for s, rows in loaded.items()}, notes)


def _check(
    task: TaskBase, source: str, rows: Iterator[tuple[int, dict[str, Any]]], problems: list[Problem]
) -> tuple[list[Example], int]:
    examples: list[Example] = []
    dropped = 0
    columns = task.columns()
    for number, row in rows:
        missing = [column for column in columns if column not in row]
        if missing:
            known = shorten_list([str(column) for column in row]) or "none"
            problems.append(
                Problem(
                    f"{source}:{number}",
                    ", ".join(missing),
                    "there is no such column",
                    f"the row has: {known}",
                )
            )
            if len(problems) > MAX_PROBLEMS or not examples:
                break  # a wrong column name is wrong in every row
            continue
        place = {"place": f"{source}:{number}"} if task.keeps_locations else {}
        try:
            examples.append({**task.example(row), **place})
        except BadRow as bad:
            if task.data.drop_empty and bad.empty:
                dropped += 1
                continue
            p = bad.problem
            problems.append(Problem(f"{source}:{number}", p.key, p.what, p.fix))
    return examples, dropped


def _cut(loaded: dict[str, list[Example]], data: DataSpec) -> dict[str, list[Example]]:
    assert data.fractions is not None
    pool = [example for rows in loaded.values() for example in rows]
    random.Random(data.seed).shuffle(pool)
    result: dict[str, list[Example]] = {}
    start = 0.0
    for split in SPLITS:
        share = data.fractions.get(split)
        if share:
            first, last = round(start * len(pool)), round((start + share) * len(pool))
            result[split] = pool[first:last]
            start += share
            if not result[split]:
                raise DataError(
                    f"task.data.fractions: {share:g} of {len(pool)} rows leave no {split}"
                )
    return result


def _sampled(split: str, rows: list[Example], data: DataSpec, notes: list[str]) -> list[Example]:
    share = {**data.sample}.get(split)  # type: ignore[call-overload]
    limit = {**data.limits}.get(split)  # type: ignore[call-overload]
    count = len(rows)
    if share is not None:
        count = max(1, round(share * count))
    if limit is not None:
        count = min(count, limit)
    if count == len(rows):
        return rows
    notes.append(f"{split}: {count} of {len(rows)} rows, sampled with seed {data.seed}")
    chosen = sorted(random.Random(data.seed).sample(range(len(rows)), count))
    return [rows[index] for index in chosen]


def check_local_data(task: TaskBase, scored: str) -> dict[str, list[Example]]:
    """Reads and checks local data on the login node, so that bad data is found before queueing.

    Args:
        task: whose data.
        scored: the split that is scored.

    Returns:
        The examples of each split.

    Raises:
        InputError, DataError: as `load`.
    """
    splits = load_examples(task).splits
    task.check_splits(splits, scored)
    return splits
