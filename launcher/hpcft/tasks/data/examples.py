"""Reads rows from files or hub data sets and turns them into checked examples."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcft.core.errors import DataError, Problem
from hpcft.core.records import DataSpec, Split
from hpcft.tasks.base import MAX_PROBLEMS, BadRow, Example, TaskBase, rows_error, shorten_list
from hpcft.tasks.data.class_values import PlainIndex
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
    warnings: list[str] = field(default_factory=list)
    """Reasons to doubt the result, for example rows that are both trained on and scored."""


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


def load_examples(task: TaskBase, scored: str | None = None) -> Examples:
    """Reads and checks the examples of every split, cuts them into fractions and samples them.

    Args:
        task: the task, which names the data.
        scored: split that is scored after training on the train split; it is compared with that.
            None: nothing is compared.

    Raises:
        InputError: rows that the task cannot use, each with file, line and field.
        DataError: a file or data set that cannot be read.
    """
    found = _read_all(task)
    _cut_and_sample(found, task.data)
    if scored is not None:
        found.warnings += _overlaps(found.splits, scored)
    return found


def _read_all(task: TaskBase) -> Examples:
    """Reads and checks all examples, as the files have them.

    Raises:
        InputError, DataError: as `load_examples`.
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
    return Examples(loaded, notes)


def _cut_and_sample(found: Examples, data: DataSpec) -> None:
    if data.fractions is not None:
        found.splits = _cut_fractions(found.splits, data)
    found.splits = {
        split: _limit_split(split, rows, data, found.notes) for split, rows in found.splits.items()
    }


def _overlaps(splits: Mapping[str, list[Example]], scored: str) -> list[str]:
    """Returns a warning if examples of the scored split are trained on, too."""
    if scored == "train" or "train" not in splits or scored not in splits:
        return []
    trained = {_content(example) for example in splits["train"]}
    both = sum(_content(example) in trained for example in splits[scored])
    if not both:
        return []
    return [
        f"{scored}: {both} of {len(splits[scored])} examples also stand in the train split, word "
        "for word; remove them from one of the two, or expect metrics that are too good"
    ]


def _content(example: Example) -> str:
    return json.dumps({key: value for key, value in example.items() if key != "place"})


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
            if bad.is_in_every_row:
                break
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


def check_local_data(task: TaskBase, scored: str, *, trains: bool = False) -> Examples:
    """Reads and checks a task's data on the login node, before anything is queued.

    Args:
        task: the task, which names the data.
        scored: name of the split that is scored.
        trains: whether the run trains on the train split.

    Returns:
        The examples of each split, and remarks on them.

    Raises:
        InputError: the task cannot use some rows.
        DataError: a file or data set cannot be read, or the splits do not suit each other.
    """
    found = _read_all(task)
    _check_indices(task, found.splits)
    _cut_and_sample(found, task.data)
    if trains:
        found.warnings += _overlaps(found.splits, scored)
    task.check_splits(found.splits, scored)
    return found


def _check_indices(task: TaskBase, splits: Mapping[str, list[Example]]) -> None:
    """Checks that labels which are given as bare indices cover the labels of the task.

    Indices from 1 on would otherwise be taken for the next label each, if the last is absent.

    Raises:
        DataError: they do not.
    """
    labels: list[str] = getattr(task, "labels", [])
    found = [example.get("label") for examples in splits.values() for example in examples]
    used = {label for label in found if isinstance(label, int)}
    if not labels or len(used) == len(labels):
        return
    if any(isinstance(label, PlainIndex) for label in found):
        absent = ", ".join(f"{i} ({name})" for i, name in enumerate(labels) if i not in used)
        raise DataError(
            f"task.labels: the data give labels as indices, {min(used)} to {max(used)}, and never "
            f"as {absent}. Indices begin at 0, so that labels 1, 2, … would each be taken for the "
            "next one: write the labels' names into the column, or list in task.labels what the "
            "column holds"
        )
