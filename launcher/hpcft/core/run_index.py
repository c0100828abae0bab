"""Finds runs in a runs folder by name or id."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from hpcft.core.errors import StoreError
from hpcft.core.files import read_record_if_exists
from hpcft.core.paths import RunPaths
from hpcft.core.records import Job

MIN_ID_CHARS = 4  # characters of a run id that name it


def _folders(folder: Path, damaged: Callable[[str], None]) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return [folder / entry.name for entry in entries if entry.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        damaged(f"{folder}: cannot be listed: {error.strerror}")
        return []


def list_runs(
    root: Path, damaged: Callable[[str], None] = lambda _: None
) -> Iterator[tuple[RunPaths, Job]]:
    """Every run below `root` with its job record, oldest first; `damaged` is told of the others."""
    found = []
    recipes = _folders(root, damaged)
    for folder in (run for recipe in recipes for run in _folders(recipe, damaged)):
        paths = RunPaths(folder)
        try:
            job = read_record_if_exists(paths.job, Job)
        except StoreError as error:
            damaged(f"a run is left out: {error}")
            continue
        if job and job.run_id != folder.name:
            damaged(f"a run is left out: {paths.job}: is that of the run {job.run_id}")
        elif job:
            found.append((paths, job))
    found.sort(key=lambda pair: pair[1].attempts[0].submitted_at if pair[1].attempts else 0.0)
    yield from found


def find_runs(
    root: Path, name: str, damaged: Callable[[str], None] = lambda _: None
) -> list[tuple[RunPaths, Job]]:
    """The runs that a user means: a recipe, a sweep, a run's id or folder, a job or array id.

    The beginning of a run id will do where nothing bears the name itself, so that a job's number
    never means a run whose id happens to begin with it.
    """
    runs = list(list_runs(root, damaged))
    named = [(paths, job) for paths, job in runs if name in _names(job) or _is(paths, name)]
    begun = [(p, j) for p, j in runs if len(name) >= MIN_ID_CHARS and j.run_id.startswith(name)]
    return named or begun


def _names(job: Job) -> set[str | None]:
    ids = {attempt.job_id for attempt in job.attempts if attempt.job_id}
    arrays = {job_id.partition("_")[0] for job_id in ids}
    return {job.recipe, job.sweep_id, job.run_id, f"{job.recipe}/{job.run_id}", *ids, *arrays}


def _is(paths: RunPaths, name: str) -> bool:
    return bool(name) and "\0" not in name and Path(name).resolve() == paths.folder.resolve()
