"""The index of a runs folder: the same answers with it, without it, and if it is damaged."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from builders import (
    Cli,
    Runs,
    run_plan,
    run_progress,
    run_recipe,
    run_record,
    write_recovery,
)
from hpcft.core import files, folder_index
from hpcft.core.files import write_record
from hpcft.core.paths import RunPaths
from hpcft.jobs import status
from hpcft.scheduler.job_state import JobState

COUNT = 12


@pytest.fixture
def finished(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Finished runs, one of them with a fallback, a run that is pending and one that is damaged."""
    monkeypatch.setattr(folder_index, "MIN_RUNS", 3)
    monkeypatch.setattr(folder_index, "BUSY_TIMEOUT_S", 0.01)
    # The time of a change of the inode cannot be set.
    monkeypatch.setattr(folder_index, "SETTLED_S", -1.0)
    for index in range(COUNT):
        run_id = f"{index:04d}aaaa"
        parts = (
            run_record(run_id, accuracy=0.5 + index / 100),
            run_progress(3600),
            run_plan(),
            run_recipe(seed=index % 3, learning_rate=1e-4 * (1 + index // 3)),
        )
        runs.add(run_id, parts=parts, point={"train.seed": index % 3})
    write_recovery(
        RunPaths(runs.root / "made" / "0001aaaa"),
        step=3,
        change="micro-batch 2 → 1",
        layout=run_plan().layout,
    )
    runs.add("bbbb0000", job_id="12")
    runs.states = {"12": JobState("PENDING", "waiting for nodes")}
    runs.add("cccc0000", parts=(run_record("cccc0000", accuracy=0.5),)).plan.write_text("{")
    return runs


def answers(cli: Cli) -> list[Any]:
    """What all commands say of the runs."""
    said = [cli("status", "--json"), cli("status"), cli("collect", "--json"), cli("collect")]
    said.append(cli("explain", "0001aaaa"))
    assert {one.code for one in said} == {0}, [one.err for one in said]
    return [one.out for one in said]


def index_file(runs: Runs) -> Path:
    return runs.root / folder_index.INDEX_FILE


def from_folders(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What all commands say without an index."""
    with monkeypatch.context() as patch:
        patch.setattr(folder_index, "load", lambda *_: {})
        return answers(cli)


def test_answers_are_the_same_from_the_index(
    finished: Runs, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not index_file(finished).exists()
    first = answers(cli)
    assert index_file(finished).stat().st_mode & 0o777 == 0o600
    reads: list[Path] = []
    real = files.open_file

    def open_file(path: Path) -> Any:
        reads.append(path)
        return real(path)

    monkeypatch.setattr(files, "open_file", open_file)
    assert answers(cli) == first
    # The pending run, the damaged one, and the plan of the run that is explained.
    # Recipes are read of runs whose rows would have the same name.
    read_of = {path.parent.name for path in reads if path.name != "recipe.json"}
    assert read_of <= {"bbbb0000", "cccc0000", "0001aaaa", "calibration"}
    assert from_folders(cli, monkeypatch) == first


@pytest.mark.parametrize("name", ["result.json", "progress.json", "job.json", "plan.json",
                                  "recoveries/1.json", "recipe.json"])  # fmt: skip
def test_a_changed_file_of_a_run_is_read_again(
    name: str, finished: Runs, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = answers(cli)
    folder = finished.root / "made" / "0001aaaa"
    text = (folder / name).read_text()
    changes = {
        "result.json": ('"wall_s": 3600.0', '"wall_s": 7200.0'),
        "progress.json": ('"node": "n7"', '"node": "n8"'),
        "job.json": ('"job_id": "11"', '"job_id": "99"'),
        "plan.json": ('"total": 8537680896', '"total": 8537680897'),
        "recoveries/1.json": ("micro-batch 2", "micro-batch 8"),
        "recipe.json": ('"learning_rate": 0.0001', '"learning_rate": 0.0007'),
    }
    assert changes[name][0] in text
    write_record_text(folder / name, text.replace(*changes[name]))
    after = answers(cli)
    if name != "plan.json":  # The result has its own count of parameters.
        assert after != before
    assert after == from_folders(cli, monkeypatch)


def write_record_text(file: Path, text: str) -> None:
    """Replaces a file by one of the same size and time, as rsync may."""
    info = file.stat()
    files.write_text(file, text)
    os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))


def test_a_result_that_is_damaged_later_is_unknown(finished: Runs, cli: Cli) -> None:
    answers(cli)
    finished.states["11"] = JobState("COMPLETED")
    paths = RunPaths(finished.root / "made" / "0003aaaa")
    paths.result.write_text(paths.result.read_text()[:-20])
    states = {run["run_id"]: run["state"] for run in cli("status", "--json").json}
    assert states["0003aaaa"] == "UNKNOWN"
    assert states["0004aaaa"] == "COMPLETED"


def test_runs_that_are_gone_leave_the_answers_and_the_index(finished: Runs, cli: Cli) -> None:
    answers(cli)
    shutil.rmtree(finished.root / "made" / "0002aaaa")
    assert "0002aaaa" not in cli("status").out
    with sqlite3.connect(index_file(finished)) as connection:
        folders = {row[0] for row in connection.execute("SELECT folder FROM texts")}
    assert "made/0002aaaa" not in folders
    assert "made/0003aaaa" in folders


def damage_header(file: Path) -> None:
    file.write_bytes(b"no database" + file.read_bytes()[11:])


def damage_page(file: Path) -> None:
    block = bytearray(file.read_bytes())
    for place in range(4096, len(block), 512):
        block[place] ^= 0x55
    file.write_bytes(bytes(block))


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:5000])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def other_digit(file: Path) -> None:
    """Changes a number in a text; SQLite does not notice."""
    block = file.read_bytes()
    assert block.count(b'"accuracy":0.51') == 1
    file.write_bytes(block.replace(b'"accuracy":0.51', b'"accuracy":0.99'))


def other_table(file: Path) -> None:
    with sqlite3.connect(file) as connection:
        connection.execute("DROP TABLE texts")
        connection.execute("CREATE TABLE texts (a, b)")


def other_text(file: Path) -> None:
    """Writes texts that no version of hpcft writes, with the right checksum."""
    with sqlite3.connect(file) as connection:
        rows = connection.execute("SELECT kind, folder, signature FROM texts").fetchall()
        for kind, folder, signature in rows:
            text = "{}" if kind == "run" else "["
            checksum = folder_index._checksum(folder, signature, text)
            connection.execute(
                "UPDATE texts SET text = ?, checksum = ? WHERE kind = ? AND folder = ?",
                (text, checksum, kind, folder),
            )


def delete(file: Path) -> None:
    file.unlink()


def put_a_folder_in_its_place(file: Path) -> None:
    file.unlink()
    file.mkdir()


def open_to_others(file: Path) -> None:
    file.chmod(0o666)


@pytest.mark.parametrize("damage", [damage_header, damage_page, cut_off, empty, other_digit,
                                    other_table, other_text, delete, open_to_others,
                                    put_a_folder_in_its_place])  # fmt: skip
def test_answers_without_a_whole_index_are_the_same(damage: Any, finished: Runs, cli: Cli) -> None:
    before = answers(cli)
    damage(index_file(finished))
    assert answers(cli) == before
    assert answers(cli) == before


def test_the_index_of_another_version_is_not_used(
    finished: Runs, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = answers(cli)
    monkeypatch.setattr(folder_index, "__version__", "99.0")
    assert not any(run.indexed for run in status_found(finished))
    assert answers(cli) == before
    assert any(run.indexed for run in status_found(finished))


def status_found(runs: Runs) -> list[Any]:
    from hpcft.core.run_index import list_runs

    return list(list_runs(runs.root))


def test_a_link_in_the_place_of_the_index_is_left_alone(finished: Runs, cli: Cli) -> None:
    target = finished.root.parent / "precious"
    target.write_text("keep")
    index_file(finished).symlink_to(target)
    answers(cli)
    assert target.read_text() == "keep"
    assert index_file(finished).is_symlink()


def test_a_runs_folder_that_cannot_be_written_has_no_index(
    finished: Runs, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def denied(path: Any, *arguments: Any, **more: Any) -> int:
        if str(path).endswith(folder_index.INDEX_FILE):
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(folder_index.os, "open", denied)
        without = answers(cli)
        assert not index_file(finished).exists()
    assert answers(cli) == without


def test_few_runs_and_files_of_this_moment_are_not_indexed(
    finished: Runs, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(folder_index, "MIN_RUNS", 100)
        answers(cli)
        assert not index_file(finished).exists()
    monkeypatch.setattr(folder_index, "SETTLED_S", 3600.0)
    answers(cli)
    assert folder_index.load(finished.root, "run") == {}


def test_an_indexed_status_equals_the_one_that_was_read(finished: Runs) -> None:
    finished.statuses()
    names = ("state", "note", "job_id", "nodes", "elapsed_s", "progress", "record", "plan",
             "recoveries", "failure", "damage", "job_ended", "job", "paths", "attempt")  # fmt: skip
    for found in status_found(finished):
        if not found.indexed:
            continue
        indexed = status.run_status(found)
        read = status._run_status(
            status._read_folder(found), status._JobView(JobState("COMPLETED"), "11")
        )
        assert {n: getattr(indexed, n) for n in names} == {n: getattr(read, n) for n in names}
        assert json.dumps(status.status_as_json(indexed)) == json.dumps(status.status_as_json(read))


def test_write_record_of_a_finished_run_again_is_seen(finished: Runs, cli: Cli) -> None:
    """A run that is submitted once more loses its result, and is no longer of the index."""
    answers(cli)
    paths = RunPaths(finished.root / "made" / "0005aaaa")
    paths.result.unlink()
    finished.states["11"] = JobState("RUNNING")
    states = {run["run_id"]: run["state"] for run in cli("status", "--json").json}
    assert states["0005aaaa"] == "RUNNING"
    write_record(paths.result, run_record("0005aaaa", accuracy=0.1))
    states = {run["run_id"]: run["state"] for run in cli("status", "--json").json}
    assert states["0005aaaa"] == "COMPLETED"


def test_an_index_that_cannot_be_opened_is_left_out(
    finished: Runs, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = answers(cli)

    def connect(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("unable to open database file")

    monkeypatch.setattr(sqlite3, "connect", connect)
    assert answers(cli) == before
    assert index_file(finished).exists()


def test_an_index_that_another_command_writes_is_left_out(finished: Runs, cli: Cli) -> None:
    before = answers(cli)
    with sqlite3.connect(index_file(finished)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        assert answers(cli) == before
    assert answers(cli) == before
    assert index_file(finished).exists()
