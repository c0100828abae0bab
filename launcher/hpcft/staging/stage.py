"""Stages recipes: downloads their hub inputs into the cache and checks them."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hpcft.config.recipe_types import SweepPoint
from hpcft.core.errors import DataError, HpcftError, HubError
from hpcft.core.records import Staged, StagedFile
from hpcft.core.units import format_bytes
from hpcft.staging import hub_client, hub_inputs, staged_inputs, text_tables, verify
from hpcft.staging.check_rows import check_rows
from hpcft.staging.hub_client import HubListing
from hpcft.staging.hub_inputs import HubInput
from hpcft.tasks.data import examples
from hpcft.tasks.data.dataset_folder import (
    declared_classes,
    prepared_files,
    prepared_rows,
    set_delimiter,
)

Say = Callable[[str], None]


@dataclass(frozen=True)
class StageResult:
    """Result of staging one hub input."""

    staged: Staged
    """Record of the input in the cache."""
    fetched_bytes: int
    """Size of the files that were downloaded, in bytes."""
    recipes: list[str]
    """Names of the recipes that use the input."""


def stage_inputs(
    points: list[SweepPoint], cache: Path, say: Say, *, bars: bool
) -> list[StageResult]:
    """Downloads the hub inputs of runs, checks them, and records them for jobs.

    Args:
        points: the runs.
        cache: folder of the Hugging Face cache.
        say: prints a line of progress.
        bars: whether to draw progress bars on stderr.

    Raises:
        DataError: with all problems; nothing is downloaded if a name is already wrong.
        HubError: the hub does not respond, and not all inputs were staged before.
    """
    recipes_by_input: dict[HubInput, list[str]] = {}
    for point in points:
        for hub_input in hub_inputs.hub_inputs_of(point.recipe).values():
            names = recipes_by_input.setdefault(hub_input, [])
            names += [point.recipe.name] if point.recipe.name not in names else []
    lookup = _list_inputs(list(recipes_by_input), cache, say)
    problems = [*lookup.problems, *_missing_splits(points, lookup.listings)]
    if problems:
        raise _error_of_all(problems)
    _check_free_space(lookup.listings, cache)
    results = {
        hub_input: StageResult(staged, 0, recipes_by_input[hub_input])
        for hub_input, staged in lookup.staged_before.items()
    }
    for hub_input, listing in lookup.listings.items():
        try:
            fetched_bytes = hub_client.missing_bytes(hub_input, listing, cache)
            staged = _stage_input(hub_input, listing, cache, say, bars=bars)
            results[hub_input] = StageResult(staged, fetched_bytes, recipes_by_input[hub_input])
        except HubError:
            raise
        except HpcftError as error:
            problems.append(str(error))
    problems = problems or _check_recipes(points, cache)
    if problems:
        raise _error_of_all(problems)
    return [results[hub_input] for hub_input in recipes_by_input]


def _error_of_all(problems: list[str]) -> DataError:
    return DataError("\n".join(dict.fromkeys(problems)))


@dataclass
class _HubLookup:
    """Hub inputs as the hub, or the cache, has them."""

    listings: dict[HubInput, HubListing] = field(default_factory=dict)
    """Commit and files of each input that the hub has."""
    staged_before: dict[HubInput, Staged] = field(default_factory=dict)
    """Inputs that are complete in the cache, if the hub does not respond."""
    problems: list[str] = field(default_factory=list)
    """A line for each input that the hub does not have."""


def _list_inputs(inputs: list[HubInput], cache: Path, say: Say) -> _HubLookup:
    """Lists the files of inputs on the hub; if it does not respond, finds them in the cache.

    Raises:
        HubError: the hub does not respond, and an input was not staged before or has changed.
    """
    lookup = _HubLookup()
    for hub_input in inputs:
        say(f"looking up {hub_input} on the hub")
        try:
            lookup.listings[hub_input] = hub_client.list_files(hub_input)
        except HubError as error:
            staged = staged_inputs.read_staged(hub_input, cache)
            if staged is None or staged_inputs.changed_since_staging(staged):
                raise
            say(f"{error}\n  using what was staged before, at commit {staged.commit[:12]}")
            lookup.staged_before[hub_input] = staged
        except DataError as error:
            lookup.problems.append(str(error))
    return lookup


def _missing_splits(points: list[SweepPoint], listings: dict[HubInput, HubListing]) -> list[str]:
    """Returns a line for each split that a recipe reads and its data set does not have."""
    problems = []
    for point in points:
        hub_input = hub_inputs.hub_inputs_of(point.recipe).get("task.data.path")
        known = listings[hub_input].splits if hub_input in listings else ()
        for split, source in examples.split_sources(point.recipe.task.data).items():
            for part in source.split("+"):
                if known and part.strip() not in known:
                    key = f"task.data.splits.{split}"
                    what = f"{hub_input} has no split {part.strip()}"
                    fix = f"use one of {', '.join(known)}"
                    problems.append(f"{point.location_of(key)} {key}: {what}; {fix}")
    return problems


def _check_free_space(listings: dict[HubInput, HubListing], cache: Path) -> None:
    """Checks that the disk has room for all that is to be downloaded.

    Raises:
        DataError: it has not.
    """
    needed_bytes = 0
    for hub_input, listing in listings.items():
        needed_bytes += hub_client.missing_bytes(hub_input, listing, cache)
        needed_bytes += (listing.builder.info.dataset_size or 0) if listing.builder else 0
    existing = next(path for path in (cache, *cache.parents) if path.is_dir())
    free_bytes = shutil.disk_usage(existing).free
    if needed_bytes > free_bytes:
        raise DataError(
            f"{cache}: {format_bytes(needed_bytes)} are to be downloaded, but only "
            f"{format_bytes(free_bytes)} are free; make room, or set HF_HOME to a larger file "
            "system that the compute nodes share"
        )


def _stage_input(
    hub_input: HubInput, listing: HubListing, cache: Path, say: Say, *, bars: bool
) -> Staged:
    """Downloads an input, checks each file, and records it; a wrong file is downloaded again.

    Raises:
        DataError: a file is wrong twice, or the data cannot be prepared.
        HubError: the hub does not respond.
    """
    before = staged_inputs.read_staged(hub_input, cache)
    missing = hub_client.missing_bytes(hub_input, listing, cache)
    commit = f"commit {listing.commit[:12]}"
    is_same = before is not None and before.commit == listing.commit and not missing
    if before and is_same and not staged_inputs.changed_since_staging(before):
        say(f"{hub_input}: already in the cache, {commit}")
    else:
        total = f"{len(listing.files)} files, {format_bytes(listing.size_bytes)}"
        say(f"{hub_input}: {total}, {format_bytes(missing)} of it to download, {commit}")
    snapshot = hub_client.snapshot_folder(hub_input, listing.commit, cache)
    checked = before.files if before and before.folder == str(snapshot) else {}
    for attempt in (1, 2):
        hub_client.download(hub_input, listing, cache, say=say, bars=bars)
        wrong = _remove_wrong_files(snapshot, listing, checked)
        if not wrong:
            break
        name, reason = next(iter(wrong.items()))
        if attempt == 2:
            what = f"{name} {reason}, after a second download too"
            raise DataError(f"{hub_input}: {what}; it was removed, try again later")
        say(f"{hub_input}: {name} {reason}; downloading it again")
    staged = _staged_record(hub_input, listing, snapshot)
    staged_inputs.write_staged(hub_input, cache, staged)
    return staged


def _remove_wrong_files(
    snapshot: Path, listing: HubListing, checked: dict[str, StagedFile]
) -> dict[str, str]:
    """Removes files that differ from the hub's, and returns how each differs.

    Args:
        snapshot: folder of the commit.
        listing: files on the hub.
        checked: files at their last check.
    """
    wrong = {}
    for name, expected in listing.files.items():
        if reason := verify.mismatch_reason(snapshot, name, expected, checked.get(name)):
            wrong[name] = reason
            (snapshot / name).resolve().unlink(missing_ok=True)
            (snapshot / name).unlink(missing_ok=True)
    return wrong


def _staged_record(hub_input: HubInput, listing: HubListing, snapshot: Path) -> Staged:
    """Prepares a data set, and returns the record of an input whose files are checked."""
    content = {name: (file.size_bytes, file.digest) for name, file in listing.files.items()}
    fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    folder, names = snapshot, list(listing.files)
    splits: dict[str, int] = {}
    if hub_input.kind == "dataset":
        folder, names, splits = _prepare_data_set(hub_input, listing, snapshot)
    files: dict[str, StagedFile] = {}
    for name in names:
        is_of_hub = name in listing.files and folder == snapshot
        digest = listing.files[name].digest if is_of_hub else ""
        state = staged_inputs.read_file_state(folder, name)
        files[name] = state.model_copy(update={"digest": digest})
    return Staged(
        kind=hub_input.kind,
        name=hub_input.name,
        config_name=hub_input.config_name,
        revision=hub_input.revision,
        commit=listing.commit,
        folder=str(folder),
        files=files,
        splits=splits,
        fingerprint=fingerprint,
        staged_at=time.time(),
    )


def _prepare_data_set(
    hub_input: HubInput, listing: HubListing, snapshot: Path
) -> tuple[Path, list[str], dict[str, int]]:
    """Converts a data set to memory-mapped tables.

    Returns:
        Folder and files of the tables, and the number of rows of each split.
    """
    folder = Path(listing.builder.cache_dir)
    raw = {
        split: [snapshot / name for name in names] for split, names in listing.data_files.items()
    }
    if text_tables.are_delimited(raw):
        folder = folder.with_name(f"{folder.name}-texts")
        text_tables.write_tables(
            raw,
            folder,
            delimiter=set_delimiter(snapshot, listing.builder.config),
            class_names=declared_classes(listing.builder),
        )
        splits = prepared_rows(folder)
        files = [file.name for split in splits for file in prepared_files(folder, split)]
        return folder, ["dataset_info.json", *files], splits
    with hub_client.translate_errors(hub_input):
        listing.builder.download_and_prepare()
        splits = {name: int(i.num_examples) for name, i in listing.builder.info.splits.items()}
        if splits != {name: _count_rows(folder, name) for name in splits}:
            # Tables were deleted; `datasets` alone only looks whether the folder exists.
            listing.builder.download_and_prepare(download_mode="reuse_cache_if_exists")
    files = [file.name for split in splits for file in prepared_files(folder, split)]
    return folder, ["dataset_info.json", *files], splits


def _count_rows(folder: Path, split: str) -> int:
    """Returns the number of rows in the tables of a split."""
    import datasets

    return sum(len(datasets.Dataset.from_file(str(f))) for f in prepared_files(folder, split))


def _check_recipes(points: list[SweepPoint], cache: Path) -> list[str]:
    """Checks the staged inputs against the recipes: architecture, tokenizer, columns and rows.

    Returns:
        A line for each problem.
    """
    problems: list[str] = []
    checked: set[str] = set()
    for point in points:
        staged, missing = staged_inputs.find_staged(point.recipe, cache)
        problems += missing
        local = hub_inputs.with_folders(point.recipe, staged)
        content = local.model_dump_json(include={"model", "task", "evaluation"})
        if missing or content in checked:
            continue
        checked.add(content)
        try:
            verify.check_model(point.recipe, local)
            check_rows(local, fixed="task.data.path" in staged)
        except HpcftError as error:
            problems.append(f"{point.recipe.name}: {error}")
    return problems
