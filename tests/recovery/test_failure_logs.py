"""The rules of the diagnosis are checked against ends of logs, each named after its class.

`data/failure_logs/<class>--<what>.log` holds what a rank, Slurm, a driver or a site's plugins have
printed before the end. The texts are made up after the symptoms of public reports.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from builders import ROOT, Runs
from hpcft.recovery import diagnosis
from hpcft.scheduler.job_state import JobState

LOGS = sorted((ROOT / "tests" / "data" / "failure_logs").glob("*.log"))


def expected_class(log: Path) -> str:
    """Returns the class that a log must get."""
    return log.name.partition("--")[0]


def class_of(log: Path, runs: Runs) -> str:
    """Returns the class that the failed run `aaaa0000` gets with this log."""
    run = runs.find("aaaa0000")
    shutil.copy(log, run.paths.logs / "11_0_log.err")
    return diagnosis.explain_failure(run.paths, run.job.attempts[-1], JobState("FAILED")).name


def test_explain_failure_classes_every_log_of_the_corpus(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.add("aaaa0000", log="")
    found = {log: class_of(log, runs) for log in LOGS}
    misses = {log.stem: got for log, got in found.items() if got != expected_class(log)}
    with capsys.disabled():
        right = len(LOGS) - len(misses)
        print(f"\n{right} of {len(LOGS)} logs ({right / len(LOGS):.1%}) get their class")
        for name, got in misses.items():
            print(f"  {name}: {got}")
    assert misses == {}


def test_the_corpus_has_logs_of_every_class() -> None:
    counts = Counter(expected_class(log) for log in LOGS)
    assert len(LOGS) >= 60
    # The others are told by a rank itself, or by Slurm's state of the job.
    in_logs = {name for name, row in diagnosis.KNOWN.items() if row.patterns}
    assert in_logs | {"fragmentation", "foreign_memory"} <= set(counts) <= set(diagnosis.KNOWN)
