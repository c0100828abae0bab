"""Reads rows from files or hub data sets and turns them into checked examples."""

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
    """Holds the checked examples of a run."""

    splits: dict[str, list[Example]]
    """Examples of each split."""
    notes: list[str] = field(default_factory=list)
    """Remarks for the reader of the result, for example on rows left out."""


def split_sources(data: DataSpec) -> dict[str, str]:
    """Returns where each split is read from: a file, or a split of the hub data set.

    A hub data set has the splits that `splits` lists; without that list, it has the usual three,
    or, with `fractions`, the train split alone.
    """
    if data.files is not None:
        sources = dict(data.files)
    else:
        sources = dict(data.splits) or {s: s for s in (SPLITS[:1] if data.fractions else SPLITS)}
    return {split: sources[split] for split in SPLITS if split in sources}


def read_splits(data: DataSpec, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Reads the rows of a split of the data set in a folder; several are joined with `+`.

    Raises:
        DataError: it cannot be read.
    """
    for part in split.split("+"):
        yield from enumerate(read_folder(Path(data.path or ""), data.name, part.strip()), 1)


def load_examples(task: TaskBase) -> Examples:
    """Reads and checks the examples of every split, cuts them into fractions and samples them.

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
        examples, dropped = _check_rows(task, source, rows, problems)
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
        loaded = _cut_fractions(loaded, data)
    return Examples({s: _limit_split(s, rows, data, notes) for s, rows in loaded.items()}, notes)


def _check_rows(
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
                break  # a wrong column name would be reported for every row
            continue
        place = {"place": f"{source}:{number}"} if task.keeps_locations else {}
        try:
            examples.append({**task.parse_row(row), **place})
        except BadRow as bad:
            if task.data.drop_empty and bad.is_empty:
                dropped += 1
                continue
            p = bad.problem
            problems.append(Problem(f"{source}:{number}", p.key, p.what, p.fix))
    return examples, dropped


def _cut_fractions(loaded: dict[str, list[Example]], data: DataSpec) -> dict[str, list[Example]]:
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
                    f"task.data.fractions: {share:g} of {len(pool)} rows leaves the {split} split "
                    "empty; raise the fraction or add rows"
                )
    return result


def _limit_split(
    split: str, rows: list[Example], data: DataSpec, notes: list[str]
) -> list[Example]:
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
    """Reads and checks a task's data on the login node, before anything is queued.

    Args:
        task: the task, which names the data.
        scored: name of the split that is scored.

    Returns:
        The examples of each split.

    Raises:
        InputError: the task cannot use some rows.
        DataError: a file or data set cannot be read, or the splits do not suit each other.
    """
    splits = load_examples(task).splits
    task.check_splits(splits, scored)
    return splits
