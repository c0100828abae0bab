"""Run folders: private, written whole, read with care, locked, and found by any of their names."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from builders import Cli
from hpcft.core import files, run_index
from hpcft.core.errors import StoreError
from hpcft.core.paths import RunPaths
from hpcft.core.records import Attempt, Job, Progress

ODD_NAMES = [
    "plain",
    "with space",
    'it\'s "quoted"',
    "ünï-日本-🙂",
    "$(touch canary);`id`",
    "-rf",
    "a'b\\c",
]


def job(run_id: str = "0123456789ab", **changes: Any) -> Job:
    fields = {"run_id": run_id, "recipe": "made", "cluster": "site", "scheduler": "slurm"}
    return Job(**(fields | changes))


def attempt(job_id: str | None, at: float = 0.0) -> Attempt:
    return Attempt(job_id=job_id, token="t", submitted_at=at, logs="/logs", host="h")


def write_run(root: Path, record: Job) -> RunPaths:
    paths = RunPaths(root / record.recipe / record.run_id)
    files.create_folder(paths.folder.parent)
    files.create_folder(paths.folder)
    files.write_record(paths.job, record)
    return paths


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_record_survives_a_folder_of_any_name(name: str, workplace: Path) -> None:
    folder = workplace / name / "runs"
    files.create_folder(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    paths = write_run(folder, job(point={"text": name}))
    assert files.read_record(paths.job, Job).point == {"text": name}
    assert [found.folder for found, _ in run_index.list_runs(folder)] == [paths.folder]
    assert run_index.find_runs(folder, str(paths.folder))
    assert sorted(path.name for path in workplace.iterdir()) == [name]


@pytest.mark.parametrize("name", ["50%", "two\nlines", "%j"])
def test_a_folder_whose_name_slurm_would_rewrite_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="may not have % or line breaks"):
        files.create_folder(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        files.create_folder(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o720, 0o702])
def test_a_folder_that_others_may_write_to_is_refused(mode: int, tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(StoreError, match="others may write to it; chmod 700"):
        files.create_folder(folder)
    folder.chmod(0o755)
    files.check_private(folder)


def test_a_folder_of_somebody_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    if mine == 0:
        os.chown(tmp_path, 12345, -1)
    with pytest.raises(StoreError, match="others may write to it"):
        files.check_private(tmp_path)


def test_what_cannot_be_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be made"):
        files.create_folder(tmp_path / "file" / "below")
    with pytest.raises(StoreError, match="No such file"):
        files.check_private(tmp_path / "absent")


# ---------------------------------------------------------------- writing


def progress(step: int) -> Progress:
    return Progress(phase="training", updated_at=1.0, started_at=0.0, step=step, node="n" * 50_000)


def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    """A writer rewrites 50 kB again and again; every reading is whole and one of those written."""
    file = tmp_path / "progress.json"
    files.write_record(file, progress(0))
    stop = threading.Event()
    written = [0]

    def rewrite() -> None:
        while not stop.is_set():
            written[0] += 1
            files.write_record(file, progress(written[0]))

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        last, readings, deadline = 0, 0, time.monotonic() + 10
        while (readings < 200 or written[0] < 20) and time.monotonic() < deadline:
            seen = files.read_record(file, Progress).step
            assert last <= seen <= written[0]
            last, readings = seen, readings + 1
    finally:
        stop.set()
        writer.join()
    assert readings >= 200
    assert written[0] >= 20
    assert [path.name for path in tmp_path.iterdir()] == ["progress.json"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_text_and_no_litter(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.json"
    files.write_text(file, "old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="No space left on device") as failed:
        files.write_text(file, "new")
    assert failed.value.filename == str(file)
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_an_interrupted_write_leaves_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_text(tmp_path / "a.json", "new")
    assert list(tmp_path.iterdir()) == []


def test_a_write_into_an_absent_folder_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as failed:
        files.write_json(tmp_path / "absent" / "a.json", {})
    assert failed.value.filename == str(tmp_path / "absent" / "a.json")


def test_a_full_disk_is_told_in_a_sentence(
    tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", full)
    said = cli("submit", tiny, "-c", "local")
    assert said.code == 2
    assert "recipe.json: Disk quota exceeded" in said.err
    assert "Traceback" not in said.err


def test_json_for_people_keeps_their_letters(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"näme": "日本"})
    text = (tmp_path / "a.json").read_text()
    assert "日本" in text
    assert json.loads(text) == {"näme": "日本"}


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is damaged"),
        (b'{"run_id": "0123', "is damaged"),
        (b"[]", "is damaged"),
        (b"\xff\xfe\x00", "is damaged"),
        (b"[" * 100_000, "is damaged"),
        (b'{"run_id": 7}', r"is damaged \(run_id: Input should be a valid string\)"),
        (b'{"run_id": "a", "recipe": "r", "cluster": "c", "scheduler": "slurm", "new": 1}',
         r"is damaged \(new: Extra inputs are not permitted\)"),
    ],
)  # fmt: skip
def test_a_damaged_record_is_told(content: bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    file.write_bytes(content)
    with pytest.raises(StoreError, match=says) as told:
        files.read_record(file, Job)
    assert str(told.value).startswith(str(file))
    assert len(str(told.value).splitlines()) == 1


def test_a_huge_record_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    with file.open("wb") as stream:
        stream.truncate(10 * 2**40)  # sparse: it takes no room, and no machine could read it
    with pytest.raises(StoreError, match="too large for a record"):
        files.read_record(file, Job)


def test_a_missing_record(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be read: No such file"):
        files.read_record(tmp_path / "job.json", Job)
    assert files.read_record_if_exists(tmp_path / "job.json", Job) is None
    with pytest.raises(StoreError, match="cannot be read: Is a directory"):
        files.read_record(tmp_path, Job)


# ---------------------------------------------------------------- the lock


def _add_one(folder: str, times: int) -> None:
    paths = RunPaths(Path(folder))
    for _ in range(times):
        with files.lock_folder(paths.folder):
            count = int(paths.job.read_text())
            time.sleep(0.001)  # whoever does not wait reads what is about to be replaced
            files.write_text(paths.job, str(count + 1))


def test_of_two_processes_one_waits(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    paths.job.write_text("0")
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=_add_one, args=(str(tmp_path), 50)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    assert paths.job.read_text() == "100"


def test_the_lock_is_given_back_after_an_error(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    with pytest.raises(ValueError, match="inside"), files.lock_folder(paths.folder):
        raise ValueError("inside")
    with files.lock_folder(paths.folder):
        pass


# ---------------------------------------------------------------- finding runs


@pytest.fixture
def runs(workplace: Path) -> Path:
    """Four runs: two points of a sweep, one alone, and one whose id begins like a job number."""
    root = workplace / "runs"
    sweep = {"recipe": "swept", "sweep_id": "sweep-11112222"}
    write_run(root, job("aaaa11112222", attempts=[attempt("900_0", 2.0)], **sweep))
    write_run(root, job("aaaa33334444", attempts=[attempt("900_1", 3.0)], **sweep))
    write_run(root, job("bbbb55556666", attempts=[attempt("899", 1.0), attempt("901", 5.0)]))
    write_run(root, job("901900000000", attempts=[attempt(None, 4.0)]))
    return root


@pytest.mark.parametrize(
    ("name", "found"),
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
        ("899", ["bbbb55556666"]),  # an earlier attempt
        ("901", ["bbbb55556666"]),  # not the run whose id begins so
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
def test_a_run_is_found_by_its_names(name: str, found: list[str], runs: Path) -> None:
    assert [record.run_id for _, record in run_index.find_runs(Path("runs"), name)] == found
    assert [record.run_id for _, record in run_index.find_runs(runs, name)] == found


def test_runs_come_oldest_first_and_damaged_ones_are_left_out(runs: Path) -> None:
    broken = RunPaths(runs / "made" / "cccc00000000")
    files.create_folder(broken.folder)
    broken.job.write_text("{")
    (runs / "made" / "dddd00000000").mkdir()
    found = [record.run_id for _, record in run_index.list_runs(runs)]
    assert found == ["bbbb55556666", "aaaa11112222", "aaaa33334444", "901900000000"]
    assert list(run_index.list_runs(runs / "absent")) == []
