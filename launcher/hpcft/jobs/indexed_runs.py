"""Finished runs in the index of a runs folder: their records are parsed when they are needed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path

from hpcft.core import folder_index
from hpcft.core.records import Plan, Progress, Recovery, RunRecord
from hpcft.core.run_index import RUNS, SEPARATOR, FoundRun
from hpcft.jobs.run_status import RunStatus, read_current_plan

_APART = ("paths", "job", "progress", "record", "plan", "recoveries", "failure")
"""Fields of a status that are records, or that a finished run does not have."""


class IndexedStatus(RunStatus):
    """The status of a finished run, from its text in the index."""

    found: FoundRun
    """The run folder, and the text."""

    def __init__(self, run: FoundRun) -> None:
        """Reads what every table shows.

        Args:
            run: the run, with its text.
        """
        _, progress, record, recoveries, rest = run.indexed.split(SEPARATOR)
        self.__dict__.update(
            json.loads(rest),
            paths=run.paths,
            job=run.job,
            failure=None,
            found=run,
            _texts=(progress, record, recoveries),
        )

    # Of a dataclass these are fields; here they are computed once, and then are fields as well.
    @cached_property
    def progress(self) -> Progress | None:
        """The last heartbeat."""
        text = self.__dict__["_texts"][0]
        return Progress.model_validate_json(text) if text else None

    @cached_property
    def record(self) -> RunRecord:
        """The result."""
        return RunRecord.model_validate_json(self.__dict__["_texts"][1])

    @cached_property
    def recoveries(self) -> tuple[Recovery, ...]:
        """Recoveries, the first one first."""
        text = self.__dict__["_texts"][2]
        if text == "[]":
            return ()
        return tuple(Recovery.model_validate_json(json.dumps(part)) for part in json.loads(text))

    @cached_property
    def plan(self) -> Plan | None:
        """The plan that ran last; it is in the run folder only."""
        return read_current_plan(self.paths, self.recoveries, [])

    def forget(self) -> None:
        """Drops the records that were parsed: those of thousands of runs take gigabytes."""
        for name in ("progress", "record", "recoveries", "plan"):
            self.__dict__.pop(name, None)

    @property
    def is_completed(self) -> bool:
        """True: only runs with a result are indexed."""
        return True


def as_text(run: RunStatus) -> str:
    """Returns the text in the index of a run that has completed and has no damaged file."""
    rest = {
        field.name: getattr(run, field.name)
        for field in fields(RunStatus)
        if field.name not in _APART
    }
    assert run.record is not None
    return SEPARATOR.join(
        [
            run.job.model_dump_json(),
            run.progress.model_dump_json() if run.progress else "",
            run.record.model_dump_json(),
            json.dumps([recovery.model_dump(mode="json") for recovery in run.recoveries]),
            json.dumps(rest),
        ]
    )


def finished(found: FoundRun, run: RunStatus) -> IndexedStatus | None:
    """Returns a finished run as one of the index; None if it has to be read each time.

    Args:
        found: the run folder.
        run: its status, read from its files.
    """
    # A note names a damaged file.
    is_whole = not (run.note or run.damage or run.failure) and run.job.attempts
    if not (run.is_completed and is_whole and found.signature):
        return None
    return IndexedStatus(replace(found, indexed=as_text(run)))


def add(runs: Iterable[FoundRun]) -> None:
    """Adds the texts of finished runs to the index of their runs folder, if they are many."""
    by_root: dict[Path, dict[str, tuple[str, str]]] = {}
    for run in runs:
        by_root.setdefault(run.root, {})[run.name] = run.signature, run.indexed
    for root, texts in by_root.items():
        if len(texts) >= folder_index.MIN_RUNS or (root / folder_index.INDEX_FILE).exists():
            settled = {
                name: text
                for name, text in texts.items()
                if folder_index.is_settled(str(root / name))
            }
            folder_index.store(root, RUNS, settled)
