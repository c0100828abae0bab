"""Finds the runs of a runs folder by name or id."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from hpcft.core import folder_index
from hpcft.core.errors import StoreError
from hpcft.core.files import read_record_if_exists
from hpcft.core.paths import RunPaths
from hpcft.core.permissions import other_owner
from hpcft.core.records import Job

MIN_ID_CHARS = 4
"""Fewest characters that a user may give of a run id."""


@dataclass(frozen=True)
class FoundRun:
    """A run folder and its job record."""

    paths: RunPaths
    """Files of the run folder."""
    job: Job
    """The job record; if it cannot be read, a placeholder that holds only the folders' names."""
    damage: str = ""
    """Why the job record cannot be read; empty if it was read."""
    signature: str = ""
    """Signature of the folder's files before they were read; empty without a result."""
    indexed: str = ""
    """Text of the index on the whole run; empty if the index has none of these files."""

    @property
    def root(self) -> Path:
        """The runs folder."""
        return self.paths.folder.parents[1]

    @property
    def name(self) -> str:
        """Recipe and run id."""
        return f"{self.paths.folder.parent.name}/{self.paths.folder.name}"


def read_run(folder: Path) -> FoundRun | None:
    """Reads the job record of a run folder; returns None if the folder is not one.

    A folder without a job record is not a run folder, unless a job has written into it.
    """
    paths = RunPaths(folder)
    try:
        job = read_record_if_exists(paths.job, Job)
    except StoreError as error:
        return _damaged(paths, str(error))
    if job is None:
        written = [file for file in (paths.result, paths.progress) if os.path.lexists(file)]
        return _damaged(paths, f"{paths.job}: is missing") if written else None
    if job.run_id != folder.name:
        return _damaged(paths, f"{paths.job}: belongs to the run {job.run_id}")
    return FoundRun(paths, job)


def _damaged(paths: RunPaths, damage: str) -> FoundRun:
    # Not validated: a folder may have a name that no recipe can have.
    job = Job.model_construct(
        run_id=paths.folder.name,
        recipe=paths.folder.parent.name,
        cluster="",
        scheduler="slurm",
    )
    return FoundRun(paths, job, damage)


def list_runs(root: Path, report: Callable[[str], None] = lambda _: None) -> Iterator[FoundRun]:
    """Lists every run below a runs folder: the oldest first, those without a job record last.

    Args:
        root: the runs folder.
        report: receives a sentence for each folder that cannot be listed.
    """
    texts = folder_index.load(root, RUNS)
    runs = [
        run
        for recipe_folder in _folders(root, report)
        for run_folder in _folders(recipe_folder, report)
        if (run := _find_run(run_folder, texts))
    ]
    if texts:  # Of runs that are gone.
        folder_index.remove(root, texts)
    yield from sorted(runs, key=_submitted_at)


RUNS = "run"
"""Kind of the texts in the index on a whole run; the job record is the first part of one."""
SEPARATOR = "\x1e"
"""Separator of the parts of a text in the index; JSON never contains it."""


def _find_run(folder: Path, texts: dict[str, tuple[str, str]]) -> FoundRun | None:
    """Reads the job record of a run folder from the index if it has the folder's files.

    Args:
        folder: the folder.
        texts: texts of the index that belong to no folder yet.
    """
    signature = folder_index.signature(str(folder))
    then, text = texts.pop(f"{folder.parent.name}/{folder.name}", ("", ""))
    if signature and signature == then:
        with contextlib.suppress(ValidationError):
            job = Job.model_validate_json(text.partition(SEPARATOR)[0])
            return FoundRun(RunPaths(folder), job, signature=signature, indexed=text)
    run = read_run(folder)
    return replace(run, signature=signature) if run and signature else run


def _submitted_at(run: FoundRun) -> float:
    if run.damage:
        return float("inf")
    return run.job.attempts[0].submitted_at if run.job.attempts else 0.0


def _folders(folder: Path, report: Callable[[str], None]) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return [folder / entry.name for entry in entries if entry.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        owner = other_owner(folder)
        cure = f"; `chmod -R go+rX {folder}` by user {owner} lets others read it" if owner else ""
        report(f"{folder}: cannot be listed: {error.strerror}{cure}")
        return []


def find_runs(
    root: Path, name: str, report: Callable[[str], None] = lambda _: None
) -> list[FoundRun]:
    """Finds the runs that a name means: a recipe, a sweep, a run id or folder, a job or array id.

    The beginning of a run id is enough if no run has the name itself. So a job id never means a run
    whose id happens to begin with it.

    Args:
        root: the runs folder.
        name: what the user wrote.
        report: receives a sentence for each folder that cannot be listed.
    """
    runs = list(list_runs(root, report))
    exact = [run for run in runs if name in _names(run.job) or _is_folder(run.paths, name)]
    if exact or len(name) < MIN_ID_CHARS:
        return exact
    return [run for run in runs if run.job.run_id.startswith(name)]


def _names(job: Job) -> set[str | None]:
    job_ids = {attempt.job_id for attempt in job.attempts if attempt.job_id}
    array_ids = {job_id.partition("_")[0] for job_id in job_ids}
    own = {job.recipe, job.sweep_id, job.run_id, f"{job.recipe}/{job.run_id}"}
    return own | job_ids | array_ids


def _is_folder(paths: RunPaths, name: str) -> bool:
    return bool(name) and "\0" not in name and Path(name).resolve() == paths.folder.resolve()
