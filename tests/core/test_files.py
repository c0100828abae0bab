"""Tests of run folders: private, written atomically, read with checks, and locked."""

from __future__ import annotations

import getpass
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from builders import Cli
from hpcft.core import files, run_index
from hpcft.core.errors import StoreError
from hpcft.core.paths import RunPaths
from hpcft.core.records import Job, Progress

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


def write_run(root: Path, record: Job) -> RunPaths:
    paths = RunPaths(root / record.recipe / record.run_id)
    files.create_folder(paths.folder.parent)
    files.create_folder(paths.folder)
    files.write_record(paths.job, record)
    return paths


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("name", ODD_NAMES)
def test_write_record_in_a_folder_of_any_name_reads_back(name: str, workplace: Path) -> None:
    folder = workplace / name / "runs"
    files.create_folder(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    paths = write_run(folder, job(point={"text": name}))
    assert files.read_record(paths.job, Job).point == {"text": name}
    assert [run.paths.folder for run in run_index.list_runs(folder)] == [paths.folder]
    assert run_index.find_runs(folder, str(paths.folder))
    assert sorted(path.name for path in workplace.iterdir()) == [name]


@pytest.mark.parametrize("name", ["50%", "two\nlines", "%j"])
def test_create_folder_whose_name_slurm_would_change_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="may not have % or line breaks"):
        files.create_folder(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_create_folder_is_private_with_any_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        files.create_folder(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o755, "others could replace a/b"


@pytest.mark.parametrize("mode", [0o777, 0o720, 0o702])
def test_create_folder_that_others_may_write_to_is_refused(mode: int, tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(StoreError, match="others may write to it; chmod 700"):
        files.create_folder(folder)
    folder.chmod(0o755)
    files.check_private(folder)


def test_check_private_folder_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    if mine == 0:
        os.chown(tmp_path, 12345, -1)
    with pytest.raises(StoreError, match="others may write to it"):
        files.check_private(tmp_path)


def test_create_folder_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be created"):
        files.create_folder(tmp_path / "file" / "below")
    with pytest.raises(StoreError, match="No such file"):
        files.check_private(tmp_path / "absent")


# ---------------------------------------------------------------- writing


def progress(step: int) -> Progress:
    return Progress(phase="training", updated_at=1.0, started_at=0.0, step=step, node="n" * 50_000)


def test_write_record_while_reading_is_never_read_in_part(tmp_path: Path) -> None:
    """A writer rewrites 50 kB again and again; every record that is read is a written one."""
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
        last, reads, deadline = 0, 0, time.monotonic() + 10
        while (reads < 200 or written[0] < 20) and time.monotonic() < deadline:
            step = files.read_record(file, Progress).step
            assert last <= step <= written[0]
            last, reads = step, reads + 1
    finally:
        stop.set()
        writer.join()
    assert reads >= 200
    assert written[0] >= 20
    assert [path.name for path in tmp_path.iterdir()] == ["progress.json"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_write_text_that_fails_leaves_the_old_text_and_no_other_file(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.json"
    files.write_text(file, "old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        files.write_text(file, "new")
    assert caught.value.filename == str(file)
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_write_text_that_is_interrupted_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_text(tmp_path / "a.json", "new")
    assert list(tmp_path.iterdir()) == []


def test_write_json_into_a_missing_folder_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        files.write_json(tmp_path / "absent" / "a.json", {})
    assert caught.value.filename == str(tmp_path / "absent" / "a.json")


def test_submit_on_a_full_disk_prints_one_sentence(
    tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", full)
    said = cli("submit", tiny, "-c", "local")
    assert said.code == 2
    assert "current_plan.json: Disk quota exceeded" in said.err
    assert "Traceback" not in said.err


def test_write_json_keeps_unicode_letters(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"näme": "日本"})
    text = (tmp_path / "a.json").read_text()
    assert "日本" in text
    assert json.loads(text) == {"näme": "日本"}


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged"),
        (b'{"run_id": "0123', "is damaged"),
        (b"[]", "is damaged"),
        (b"\xff\xfe\x00", "is damaged"),
        (b"[" * 100_000, "is damaged"),
        (b'{"run_id": 7}', r"is damaged \(run_id: Input should be a valid string\)"),
    ],
)  # fmt: skip
def test_read_record_that_is_damaged_names_the_problem(
    content: bytes, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "job.json"
    file.write_bytes(content)
    with pytest.raises(StoreError, match=message) as caught:
        files.read_record(file, Job)
    assert str(caught.value).startswith(str(file))
    assert len(str(caught.value).splitlines()) == 1


def test_read_record_with_an_unknown_field_ignores_it(tmp_path: Path) -> None:
    files.write_record(tmp_path / "job.json", job())
    fields = json.loads((tmp_path / "job.json").read_text())
    files.write_json(tmp_path / "job.json", fields | {"new": 1})
    assert files.read_record(tmp_path / "job.json", Job) == job()


def test_read_record_of_a_newer_format_says_what_to_do(tmp_path: Path) -> None:
    fields = job().model_dump() | {"schema_version": 2, "scheduler": "another"}
    files.write_json(tmp_path / "job.json", fields)
    with pytest.raises(StoreError, match=r"a newer hpcft wrote it .* or upgrade this one"):
        files.read_record(tmp_path / "job.json", Job)


def test_read_record_of_a_pipe_does_not_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "job.json")
    with pytest.raises(StoreError, match="cannot be read: is not a regular file"):
        files.read_record(tmp_path / "job.json", Job)


def test_write_record_once_keeps_the_first(tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    assert files.write_record_once(file, job())
    assert not files.write_record_once(file, job("fedcba987654"))
    assert files.read_record(file, Job) == job()
    assert [path.name for path in tmp_path.iterdir()] == ["job.json"]


def test_is_locked_while_another_command_holds_the_lock(tmp_path: Path) -> None:
    assert not files.is_locked(tmp_path)
    with files.lock_folder(tmp_path):
        assert files.is_locked(tmp_path)
    assert not files.is_locked(tmp_path)


def test_read_record_that_is_huge_is_refused_unread(tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    with file.open("wb") as stream:
        stream.truncate(10 * 2**40)  # Sparse: it takes no space, and no machine could read it.
    with pytest.raises(StoreError, match="too large for a record"):
        files.read_record(file, Job)


def test_read_record_that_is_missing_is_reported(tmp_path: Path) -> None:
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
            time.sleep(
                0.001
            )  # A process that does not wait reads a number that is about to be replaced.
            files.write_text(paths.job, str(count + 1))


def test_lock_folder_makes_a_second_process_wait(tmp_path: Path) -> None:
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


def test_lock_folder_is_released_after_an_error(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    with pytest.raises(ValueError, match="inside"), files.lock_folder(paths.folder):
        raise ValueError("inside")
    with files.lock_folder(paths.folder):
        pass


def test_lock_folder_gives_up_and_names_the_command_that_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A submission that was stopped with Ctrl-Z keeps the lock for ever."""
    code = (
        "import sys, time; from pathlib import Path; from hpcft.core import files\n"
        f"with files.lock_folder(Path({str(tmp_path)!r})): print('locked', flush=True); "
        "time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, "submit", "my recipe.yaml"], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        holder.send_signal(signal.SIGSTOP)
        monkeypatch.setattr(files, "_LOCK_SILENT_S", 0.1)
        with pytest.raises(StoreError) as error, files.lock_folder(tmp_path, 0.3):
            pass
        holder.kill()
    told = f"`-c submit 'my recipe.yaml'` (process {holder.pid} of {getpass.getuser()} on "
    assert told in str(error.value)
    assert "still locked after 0 s by" in str(error.value)
    assert "Ctrl-Z" in str(error.value)
    assert f"waiting for {told}" in caplog.text, "it says so as soon as it waits"
    with files.lock_folder(tmp_path, 0.3):
        assert f"process {os.getpid()} of" in (tmp_path / ".lock").read_text()


# ---------------------------------------------------------------- many files at a time


def test_synced_together_syncs_new_files_at_the_end_and_replaced_ones_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        real(handle)
        synced.append(Path(os.readlink(f"/dev/fd/{handle}")).name.strip(".").partition(".json")[0])

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_text(tmp_path / "old.json", "1")
    assert synced == ["old"]
    with files.synced_together():
        files.write_text(tmp_path / "old.json", "2")
        assert synced == ["old"] * 2
        for name in ("a", "b", "moved"):
            files.write_text(tmp_path / f"{name}.json", "3")
        (tmp_path / "moved.json").rename(tmp_path / "away.json")
        assert synced == ["old"] * 2
    assert sorted(synced) == ["a", "b", "old", "old"]
    files.write_text(tmp_path / "c.json", "4")
    assert synced[-1] == "c"


def test_for_each_raises_the_error_of_a_call() -> None:
    done: list[int] = []

    def call(number: int) -> None:
        if number == 3:
            raise OSError(28, "No space left on device")
        done.append(number)

    with pytest.raises(OSError, match="No space left"):
        files.for_each(call, range(6))
    assert 3 not in done
    files.for_each(done.append, [7])
    assert done[-1] == 7
