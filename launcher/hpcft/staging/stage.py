"""`hpcft stage`: everything that recipes take from the hub, into the cache, and checked there."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hpcft.config.recipe_types import SweepPoint
from hpcft.core.errors import DataError, HpcftError, HubError
from hpcft.core.records import Staged, StagedFile
from hpcft.core.units import format_bytes
from hpcft.staging import hub_client, hub_inputs, staged_inputs, verify
from hpcft.staging.check_rows import check_rows
from hpcft.staging.hub_client import HubListing
from hpcft.staging.hub_inputs import HubInput
from hpcft.tasks.data import examples
from hpcft.tasks.data.dataset_folder import prepared_files

Say = Callable[[str], None]


@dataclass(frozen=True)
class StageResult:
    """What became of a need."""

    staged: Staged
    fetched_bytes: int
    recipes: list[str]


def stage_inputs(
    points: list[SweepPoint], folder: Path, say: Say, *, bars: bool
) -> list[StageResult]:
    """Fetches what the runs need, checks it, and notes it for jobs.

    Args:
        points: the runs.
        folder: the hub's cache.
        say: is told of progress.
        bars: whether progress may be drawn as bars on stderr.

    Raises:
        DataError: with everything that is wrong; nothing is fetched where names already are.
        HubError: the hub does not answer, and not all was staged before.
    """
    wanted: dict[HubInput, list[str]] = {}
    for point in points:
        for need in hub_inputs.hub_inputs_of(point.recipe).values():
            users = wanted.setdefault(need, [])
            users += [point.recipe.name] if point.recipe.name not in users else []
    listings, kept, problems = _ask(wanted, folder, say)
    problems += _absent_splits(points, listings)
    if problems:
        raise _all_of(problems)
    _check_room(listings, folder)
    outcomes = {need: StageResult(staged, 0, wanted[need]) for need, staged in kept.items()}
    for need, listing in listings.items():
        try:
            before = hub_client.lacking_bytes(need, listing, folder)
            staged = _stage_one(need, listing, folder, say, bars=bars)
            outcomes[need] = StageResult(staged, before, wanted[need])
        except HubError:
            raise
        except HpcftError as error:
            problems.append(str(error))
    problems = problems or _disagreements(points, folder)
    if problems:
        raise _all_of(problems)
    return [outcomes[need] for need in wanted]


def _all_of(problems: list[str]) -> DataError:
    return DataError("\n".join(dict.fromkeys(problems)))


def _ask(
    wanted: dict[HubInput, list[str]], folder: Path, say: Say
) -> tuple[dict[HubInput, HubListing], dict[HubInput, Staged], list[str]]:
    """What the hub has of each need; without the hub, what was staged before and is whole."""
    listings: dict[HubInput, HubListing] = {}
    kept: dict[HubInput, Staged] = {}
    problems: list[str] = []
    for need in wanted:
        say(f"asking the hub for {need}")
        try:
            listings[need] = hub_client.list_files(need)
        except HubError as error:
            known = staged_inputs.read_staged(need, folder)
            if known is None or staged_inputs.changed_since_staging(known):
                raise
            say(f"{error}\n  kept as it was staged before, at {known.commit[:12]}")
            kept[need] = known
        except DataError as error:
            problems.append(str(error))
    return listings, kept, problems


def _absent_splits(points: list[SweepPoint], listings: dict[HubInput, HubListing]) -> list[str]:
    """Splits that recipes read and data sets do not have, told before anything is fetched."""
    found = []
    for point in points:
        need = hub_inputs.hub_inputs_of(point.recipe).get("task.data.path")
        known = listings[need].splits if need in listings else ()
        for split, source in examples.split_sources(point.recipe.task.data).items():
            for part in source.split("+"):
                if known and part.strip() not in known:
                    where = point.where(("task", "data", "splits", split))
                    has = f"it has {', '.join(known)}"
                    key = f"task.data.splits.{split}"
                    found.append(f"{where} {key}: {need} has no split {part.strip()}; {has}")
    return found


def _check_room(listings: dict[HubInput, HubListing], folder: Path) -> None:
    """Refuses to begin what the disk has no room for."""
    lacking = 0
    for need, listing in listings.items():
        lacking += hub_client.lacking_bytes(need, listing, folder)
        prepared = listing.builder.info.dataset_size if listing.builder else 0
        lacking += prepared or 0
    at = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(at).free
    if lacking > free:
        raise DataError(
            f"{folder}: {format_bytes(lacking)} are to be fetched, {format_bytes(free)} are free; "
            "make room, or set HF_HOME to a larger file system that compute nodes share"
        )


def _stage_one(
    need: HubInput, listing: HubListing, folder: Path, say: Say, *, bars: bool
) -> Staged:
    """Fetches a need and checks each file; one that differs is fetched once more."""
    known = staged_inputs.read_staged(need, folder)
    lacking = hub_client.lacking_bytes(need, listing, folder)
    if (
        known
        and known.commit == listing.commit
        and not lacking
        and not staged_inputs.changed_since_staging(known)
    ):
        say(f"{need}: is there, at {listing.commit[:12]}")
    else:
        count = f"{len(listing.files)} files, {format_bytes(listing.size_bytes)}"
        say(f"{need}: {count}, {format_bytes(lacking)} of it to fetch, at {listing.commit[:12]}")
    at = hub_client.snapshot_folder(need, listing.commit, folder)
    checked = known.files if known and known.folder == str(at) else {}
    for attempt in (1, 2):
        hub_client.fetch(need, listing, folder, say, bars)
        wrong = {}
        for name, expected in listing.files.items():
            if reason := verify.differs(at, name, expected, checked.get(name)):
                wrong[name] = reason
                (at / name).resolve().unlink(missing_ok=True)
                (at / name).unlink(missing_ok=True)
        if not wrong:
            break
        name, reason = next(iter(wrong.items()))
        if attempt == 2:
            raise DataError(f"{need}: {name} {reason}, twice; it was removed, try again later")
        say(f"{need}: {name} {reason}; fetching it again")
    staged = _noted(need, listing, at)
    staged_inputs.write_staged(need, folder, staged)
    return staged


def _noted(need: HubInput, listing: HubListing, at: Path) -> Staged:
    content = {name: (file.size_bytes, file.digest) for name, file in listing.files.items()}
    fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    folder, names = at, list(listing.files)
    splits: dict[str, int] = {}
    if need.kind == "dataset":
        folder, names, splits = _prepared(need, listing)
    files: dict[str, StagedFile] = {}
    for name in names:
        digest = listing.files[name].digest if name in listing.files and folder == at else ""
        files[name] = staged_inputs.file_state(folder, name).model_copy(update={"digest": digest})
    return Staged(
        kind=need.kind,
        name=need.name,
        config_name=need.config_name,
        revision=need.revision,
        commit=listing.commit,
        folder=str(folder),
        files=files,
        splits=splits,
        fingerprint=fingerprint,
        staged_at=time.time(),
    )


def _prepared(need: HubInput, listing: HubListing) -> tuple[Path, list[str], dict[str, int]]:
    """A data set as `datasets` prepares it, memory-mapped tables: folder, files, rows by split."""
    folder = Path(listing.builder.cache_dir)
    with hub_client.translate_errors(need):
        listing.builder.download_and_prepare()
        splits = {name: int(i.num_examples) for name, i in listing.builder.info.splits.items()}
        if splits != {name: _rows(folder, name) for name in splits}:
            # Files that were deleted since: by itself it looks at the folder only.
            listing.builder.download_and_prepare(download_mode="reuse_cache_if_exists")
    files = [file.name for split in splits for file in prepared_files(folder, split)]
    return folder, ["dataset_info.json", *files], splits


def _rows(folder: Path, split: str) -> int:
    """Rows of a split as it lies there."""
    import datasets

    return sum(len(datasets.Dataset.from_file(str(f))) for f in prepared_files(folder, split))


def _disagreements(points: list[SweepPoint], folder: Path) -> list[str]:
    """What recipes and staged inputs do not agree on: architecture, tokenizer, columns, rows."""
    problems: list[str] = []
    checked: set[str] = set()
    for point in points:
        staged, missing = staged_inputs.find_staged(point.recipe, folder)
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
