"""Tests of finding runs: by id, recipe, sweep, folder or job id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpcft.core import files, run_index
from hpcft.core.paths import RunPaths
from hpcft.core.records import Attempt, Job


def write_run(root: Path, run_id: str, attempts: list[Attempt], **fields: Any) -> None:
    defaults = {"recipe": "made", "cluster": "site", "scheduler": "slurm"}
    job = Job(run_id=run_id, attempts=attempts, **(defaults | fields))
    paths = RunPaths(root / job.recipe / job.run_id)
    files.create_folder(paths.folder.parent)
    files.create_folder(paths.folder)
    files.write_record(paths.job, job)


def attempt(job_id: str | None, at: float = 0.0) -> Attempt:
    return Attempt(job_id=job_id, token="t", submitted_at=at, logs="/logs", host="h")


@pytest.fixture
def runs(workplace: Path) -> Path:
    """Four runs: two points of a sweep, one alone, and one whose id begins like a job id."""
    root = workplace / "runs"
    sweep = {"recipe": "swept", "sweep_id": "sweep-11112222"}
    write_run(root, "aaaa11112222", [attempt("900_0", 2.0)], **sweep)
    write_run(root, "aaaa33334444", [attempt("900_1", 3.0)], **sweep)
    write_run(root, "bbbb55556666", [attempt("899", 1.0), attempt("901", 5.0)])
    write_run(root, "901900000000", [attempt(None, 4.0)])
    return root


@pytest.mark.parametrize(
    ("name", "run_ids"),
    [
        ("aaaa11112222", ["aaaa11112222"]),
        ("aaaa1", ["aaaa11112222"]),
        ("aaaa", ["aaaa11112222", "aaaa33334444"]),
        ("swept", ["aaaa11112222", "aaaa33334444"]),
        ("swept/aaaa33334444", ["aaaa33334444"]),
        ("sweep-11112222", ["aaaa11112222", "aaaa33334444"]),
        ("made", ["bbbb55556666", "901900000000"]),
        ("900_1", ["aaaa33334444"]),
        ("900", ["aaaa11112222", "aaaa33334444"]),
        pytest.param("899", ["bbbb55556666"], id="an earlier attempt"),
        pytest.param("901", ["bbbb55556666"], id="a job id, not the run id that begins so"),
        ("9019", ["901900000000"]),
        ("runs/made/bbbb55556666", ["bbbb55556666"]),
        ("./runs/../runs/made/bbbb55556666/", ["bbbb55556666"]),
        ("b", []),
        ("", []),
        ("nope", []),
        ("a\0b", []),
        ("*", []),
    ],
)
def test_find_runs_by_a_name(name: str, run_ids: list[str], runs: Path) -> None:
    assert [run.job.run_id for run in run_index.find_runs(Path("runs"), name)] == run_ids
    assert [run.job.run_id for run in run_index.find_runs(runs, name)] == run_ids


def test_list_runs_orders_by_submission_and_puts_damaged_ones_last(runs: Path) -> None:
    damaged = RunPaths(runs / "made" / "cccc00000000")
    files.create_folder(damaged.folder)
    damaged.job.write_text("{")
    (runs / "made" / "dddd00000000").mkdir()  # Without files it is no run folder.
    *whole, last = run_index.list_runs(runs)
    assert [run.job.run_id for run in whole] == [
        "bbbb55556666", "aaaa11112222", "aaaa33334444", "901900000000",
    ]  # fmt: skip
    assert not any(run.damage for run in whole)
    assert last.paths == damaged
    assert "job.json: is damaged" in last.damage
    assert (last.job.run_id, last.job.recipe) == ("cccc00000000", "made")


def test_list_runs_of_a_missing_folder_is_empty(tmp_path: Path) -> None:
    assert list(run_index.list_runs(tmp_path / "absent")) == []
