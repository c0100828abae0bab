"""Submissions of runs that are there already, complete or with files that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builders import Cli, run_progress
from hpcft.core.files import write_record
from hpcft.core.paths import RunPaths
from hpcft.core.records import Plan


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the bytes of every file below a folder."""
    return {str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def cut(file: Path) -> None:
    """Leaves the first half of a file."""
    file.write_text(file.read_text()[: file.stat().st_size // 2])


def make_newer(file: Path) -> None:
    """Gives a record a format that only a newer hpcft can read."""
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema_version": 99}))


def give_to_another_run(file: Path) -> None:
    """Gives a record the id of another run."""
    file.write_text(json.dumps(json.loads(file.read_text()) | {"run_id": "0123456789ab"}))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (cut, "is damaged"),
    "newer": (make_newer, "a newer hpcft wrote it (format 99"),
    "another's": (give_to_another_run, "belongs to the run 0123456789ab"),
}


def test_submit_of_a_completed_run_finds_it(completed: RunPaths, tiny: Path, cli: Cli) -> None:
    said = cli("submit", tiny, "-c", "local")
    assert said.code == 0
    assert "has completed already" in said.err


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["result.json", "job.json"])
def test_submit_of_a_damaged_run_refuses_and_touches_nothing(
    name: str, damage: str, completed: RunPaths, tiny: Path, cli: Cli
) -> None:
    change, words = DAMAGES[damage]
    change(completed.folder / name)
    before = contents(completed.folder)
    refused = cli("submit", tiny, "-c", "local")
    assert refused.code == 2
    assert f"{name}: {words}" in refused.err
    assert "--again" in refused.err
    for arguments in (("resume",), ("cancel",)):
        said = cli(*arguments, completed.folder.name)
        assert said.code == (2 if arguments == ("resume",) else 0)
        if name == "job.json" or arguments == ("resume",):
            assert f"{name}: {words}" in said.err
    assert contents(completed.folder) == before
    (run,) = cli("status", "--json").json
    assert (run["run_id"], run["state"]) == (completed.folder.name, "UNKNOWN")
    assert f"{name}: {words}" in run["note"]
    (row,) = cli("collect", "--json").json
    assert (row["run_ids"], row["state"]) == ([completed.folder.name], "UNKNOWN")
    assert f"{name}: {words}" in row["note"]
    assert f"{name}: {words}" in cli("collect").out
    assert contents(completed.folder) == before


@pytest.mark.parametrize("name", ["result.json", "job.json"])
def test_submit_again_of_a_damaged_run_keeps_the_old_files(
    name: str, completed: RunPaths, tiny: Path, cli: Cli
) -> None:
    cut(completed.folder / name)
    damaged = (completed.folder / name).read_bytes()
    said = cli("submit", tiny, "-c", "local", "--again", "--json")
    assert said.code == 0, said.err
    assert said.json[0]["outcome"] == "submitted"
    assert (completed.previous / "0" / name).read_bytes() == damaged
    assert not completed.result.exists()
    attempts = json.loads(completed.job.read_text())["attempts"]
    assert len(attempts) == (1 if name == "job.json" else 2)
    assert cli("status", "--json").json[0]["state"] == "FAILED"


def test_submit_again_without_a_readable_job_refuses_while_a_job_is_alive(
    completed: RunPaths, tiny: Path, cli: Cli
) -> None:
    cut(completed.job)
    completed.result.unlink()
    write_record(completed.progress, run_progress())
    before = contents(completed.folder)
    for more in ((), ("--again",)):
        said = cli("submit", tiny, "-c", "local", *more)
        assert said.code == 2
        assert "a job of this run writes heartbeats, but its id is not known" in said.err
    assert contents(completed.folder) == before


def test_submit_of_a_run_with_a_damaged_recovery_touches_nothing(
    completed: RunPaths, tiny: Path, cli: Cli
) -> None:
    """It has saved something, so that it would resume; but from which plan?"""
    completed.result.unlink()
    completed.answers.mkdir()
    (completed.answers / "0.jsonl").write_text("{}\n")
    completed.recoveries.mkdir()
    (completed.recoveries / "1.json").write_text("{")
    before = contents(completed.folder)
    said = cli("submit", tiny, "-c", "local")
    assert said.code == 2
    assert "recoveries/1.json: is damaged" in said.err
    assert contents(completed.folder) == before


def test_submit_writes_the_plan_twice(completed: RunPaths, cli: Cli) -> None:
    """One is what was submitted; the other changes with the layout."""
    plan, current = (json.loads(file.read_text())
                     for file in (completed.plan, completed.current_plan))  # fmt: skip
    assert plan == current
    assert Plan.model_validate_json(completed.plan.read_text()).recovery_number == 0


def with_one_key_more(value: Any) -> Any:
    """Returns a record as a newer hpcft may write it."""
    return value | {"added_later": [1, None]} if isinstance(value, dict) else value


def test_one_key_more_in_each_record_changes_nothing(
    completed: RunPaths, tiny: Path, cli: Cli
) -> None:
    write_record(completed.progress, run_progress(age_s=3600))
    before = [cli(verb, "--json").json for verb in ("status", "collect")]
    for file in completed.folder.glob("*.json"):
        file.write_text(json.dumps(with_one_key_more(json.loads(file.read_text()))))
    assert [cli(verb, "--json").json for verb in ("status", "collect")] == before
    assert "has completed already" in cli("submit", tiny, "-c", "local").err
