"""Fixtures of runs that were submitted, without a process or job."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from builders import Cli, run_record
from hpcft.core.files import write_record
from hpcft.core.paths import RunPaths
from hpcft.scheduler.local import Local
from hpcft.scheduler.protocol import JobRequest, Submission

ENDED_JOB = "999999999"
"""A process id that no process has."""


@pytest.fixture
def submitted(tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    """A run that was submitted, and whose job has ended without a result."""

    def submit(self: Local, request: JobRequest) -> list[Submission]:
        return [Submission(ENDED_JOB, time.time())]

    monkeypatch.setattr(Local, "submit", submit)
    said = cli("submit", tiny, "-c", "local", "--json")
    assert said.code == 0, said.err
    return RunPaths(Path(said.json[0]["folder"]))


@pytest.fixture
def completed(submitted: RunPaths) -> RunPaths:
    """A run that was submitted, and has a result."""
    record = run_record(submitted.folder.name, accuracy=0.9).model_copy(update={"recipe": "tiny"})
    write_record(submitted.result, record)
    return submitted
