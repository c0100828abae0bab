"""A thousand damaged run folders: no traceback, no hang, and no run is left out."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutations
import pytest

from builders import Cli, run_plan, run_progress, run_recipe, run_record
from hpcft.core.files import create_folder, write_record
from hpcft.core.paths import RunPaths
from hpcft.core.records import Attempt, Fingerprints, Job, RankError, Recovery

HANG_S = 5.0
GOOD, BAD, OTHER = "a" * 12, "b" * 12, "c" * 12
VALUES = (None, True, 0, -1, 1.5, 10**18, 10**99, 10**400, 1e308, -1e308, "", "x", "\0", "../../x",
          "*", "/", "0", "9" * 10, "-1", "\x1b[2J", "[bold]", "\udc80", "x" * 9000, [], {}, [[]],
          {"": None}, [1e308] * 3)  # fmt: skip


def write_run(root: Path, run_id: str, *, done: bool) -> RunPaths:
    """Writes a run with everything that the commands read."""
    paths = RunPaths(root / "made" / run_id)
    create_folder(paths.folder)
    for folder in (paths.logs, paths.errors, paths.recoveries, paths.model, paths.checkpoints):
        folder.mkdir()
    made = run_plan()
    attempt = Attempt(job_id="999999999", token=f"t-{run_id}", submitted_at=1.0,
                      logs=str(paths.logs), host=os.uname().nodename,
                      process_started=1.0)  # fmt: skip
    write_record(paths.job, Job(run_id=run_id, recipe="made", cluster="site", scheduler="local",
                               attempts=[attempt]))  # fmt: skip
    write_record(paths.recipe, run_recipe())
    write_record(paths.fingerprints, Fingerprints(files={"a": "b"}))
    write_record(paths.plan, made)
    write_record(paths.progress, run_progress())
    write_record(paths.recoveries / "1.json", Recovery(
        number=1, at=1.0, cause="out_of_memory", job_id="1", rank=0, node="n", change="c",
        evidence="e", action="restart",
        layout=made.layout, per_device_eval_batch_size=1,
    ))  # fmt: skip
    if done:
        write_record(paths.result, run_record(run_id, accuracy=0.5).model_copy(
            update={"cluster": "site"}))  # fmt: skip
    else:
        write_record(paths.errors / "0.json", RankError(
            rank=0, node="n0", at=1.0, kind="ValueError", message="told"))  # fmt: skip
    for stream in ("out", "err"):
        (paths.logs / f"999999999_0_log.{stream}").write_text("a line\n")
    return paths


def replace_file(rng: random.Random, file: Path, others: list[Path]) -> None:
    """Puts something else in a file's place, or removes the file."""
    data = file.read_bytes()
    file.unlink()
    kind = rng.randrange(10)
    if kind == 0:
        file.mkdir()
    elif kind == 1:
        os.mkfifo(file)
    elif kind == 2:
        file.symlink_to(rng.choice(("nowhere", file.name, "/dev/zero", "/proc/self/mem", ".")))
    elif kind == 3:
        with file.open("wb") as stream:
            stream.truncate(rng.choice((0, 50_000_000, 10**12 if file.suffix == ".json" else 1)))
    elif kind == 4:
        file.write_bytes(rng.choice((b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000)))
    elif kind == 5:
        others = [other for other in others if other != file and other.is_file()]
        shutil.copy(rng.choice(others), file)
    elif kind == 6:
        file.write_bytes(mutations.content(rng, data))
    elif kind == 7:
        file.write_bytes(data)
        file.chmod(0)
    elif kind == 8:
        file.write_bytes(rng.randbytes(rng.choice((1, 1000, 60_000))))


def change_values(rng: random.Random, file: Path) -> None:
    """Replaces some values of a record."""
    value = json.loads(file.read_text())
    for _ in range(rng.choice((1, 1, 2))):
        places = mutations.places(value)
        new = rng.choice(VALUES)

        def change(parent: Any, key: Any, new: Any = new) -> None:
            parent[key] = new

        value = mutations.changed(value, rng.choice(places), change)
    file.write_text(json.dumps(value))


def damage(seed: int, paths: RunPaths) -> str:
    """Damages a run folder in the way that belongs to a seed; returns the damaged path."""
    rng = random.Random(seed)
    files = sorted(path for path in paths.folder.rglob("*") if path.is_file())
    file = rng.choice(files)
    if rng.random() < 0.1:
        folder = rng.choice((paths.logs, paths.errors, paths.recoveries))
        shutil.rmtree(folder)
        rng.choice((lambda: None, folder.touch, lambda: os.mkfifo(folder),
                    lambda: folder.symlink_to(folder.name)))()  # fmt: skip
        return str(folder)
    if file.suffix == ".json" and rng.random() < 0.5:
        change_values(rng, file)
    else:
        replace_file(rng, file, files)
    return str(file)


VERBS = (("status",), ("status", "--json"), ("collect",), ("collect", "--json"),
         ("collect", "--format", "md"))  # fmt: skip


def survive(seeds: range, workplace: Path, cli: Cli) -> None:
    """Runs all commands on a damaged run next to a healthy one."""
    for seed in seeds:
        root = workplace / "runs"
        write_run(root, GOOD, done=True)
        hit = damage(seed, write_run(root, BAD, done=seed % 2 == 0))
        verbs = [VERBS[seed % len(VERBS)], VERBS[(seed + 1) % len(VERBS)], ("logs", BAD),
                 ("logs", BAD, "--stderr"), ("explain", BAD), ("cancel", BAD)]  # fmt: skip
        for verb in verbs:
            started = time.monotonic()
            try:
                said = cli(*verb)
                assert time.monotonic() - started < HANG_S
                assert said.code == 0 or (verb in verbs[2:] and said.code == 2), said.err
                assert "Traceback" not in said.err
                assert "\x1b" not in said.out + said.err
                if verb[0] == "status":
                    assert GOOD in said.out
                    assert BAD in said.out
                if verb[0] == "collect":
                    assert "0.5" in said.out, "the healthy run is in the table"
            except BaseException as error:
                raise AssertionError(f"seed {seed}: {' '.join(verb)} with {hit} damaged") from error
        assert {path.name for path in workplace.iterdir()} == {"runs"}
        shutil.rmtree(root)


def test_commands_survive_a_few_damaged_folders(workplace: Path, cli: Cli) -> None:
    survive(range(12), workplace, cli)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
def test_commands_survive_many_damaged_folders(part: int, workplace: Path, cli: Cli) -> None:
    survive(range(200 * part, 200 * (part + 1)), workplace, cli)


# ---------------------------------------------------------------- faults that fuzzing has found


@pytest.mark.parametrize("how", ["empty", "fifo", "loop", "another's", "hostile id", "folder"])
def test_commands_with_a_damaged_job_record_say_why_and_list_both_runs(
    how: str, workplace: Path, cli: Cli
) -> None:
    write_run(workplace / "runs", GOOD, done=True)
    job = write_run(workplace / "runs", BAD, done=False).job
    text = job.read_text()
    job.unlink()
    says = {
        "empty": "is damaged",
        "fifo": "is not a regular file",
        "loop": "Too many levels",
        "another's": f"belongs to the run {OTHER}",
        "hostile id": "attempts.0.job_id",
        "folder": "Is a directory",
    }
    makes: dict[str, Callable[[], object]] = {
        "empty": job.touch,
        "fifo": lambda: os.mkfifo(job),
        "loop": lambda: job.symlink_to(job.name),
        "another's": lambda: job.write_text(text.replace(BAD, OTHER)),
        "hostile id": lambda: job.write_text(text.replace("999999999", "--me")),
        "folder": job.mkdir,
    }
    makes[how]()
    for verb in VERBS:
        said = cli(*verb)
        assert said.code == 0
        assert "UNKNOWN" in said.out
        assert says[how] in said.out
        assert GOOD in said.out or "0.5" in said.out
    said = cli("cancel", BAD)
    assert says[how] in said.err


def test_status_with_the_result_of_another_run_is_unknown(workplace: Path, cli: Cli) -> None:
    good = write_run(workplace / "runs", GOOD, done=True)
    shutil.copy(good.result, write_run(workplace / "runs", BAD, done=False).result)
    views = {view["run_id"]: view for view in cli("status", "--json").json}
    assert views[GOOD]["state"] == "COMPLETED"
    assert views[BAD]["state"] == "UNKNOWN"
    assert f"belongs to the run {GOOD}" in views[BAD]["note"]


@pytest.mark.parametrize(
    ("step", "says"), [(10**400, "step: Input should be less than"), (10**18, "100%")]
)
def test_status_survives_a_step_number_without_bounds(
    step: int, says: str, workplace: Path, cli: Cli
) -> None:
    paths = write_run(workplace / "runs", BAD, done=False)
    value = json.loads(paths.progress.read_text()) | {"step": step, "total_steps": 1}
    paths.progress.write_text(json.dumps(value))
    said = cli("status")
    assert said.code == 0
    assert says in said.out


@pytest.mark.parametrize("cluster", ["../../canary", "/canary", "a\0b"])
def test_collect_writes_no_file_that_a_record_names(
    cluster: str, workplace: Path, cli: Cli
) -> None:
    paths = write_run(workplace / "runs", GOOD, done=True)
    value = json.loads(paths.result.read_text()) | {"cluster": cluster}
    paths.result.write_text(json.dumps(value))
    said = cli("collect")
    assert said.code == 0
    assert "is damaged" in said.out
    assert not [*workplace.rglob("*canary*")]


class Touch:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("canary"),)


def test_commands_load_no_pickle_of_a_run_folder(workplace: Path, cli: Cli) -> None:
    paths = write_run(workplace / "runs", BAD, done=False)
    planted = pickle.dumps(Touch())
    pickle.loads(planted)
    assert Path("canary").exists(), "the trap works"
    Path("canary").unlink()
    for name in ("model/pytorch_model.bin", "model/adapter_model.bin", "checkpoints/x.pt",
                 "checkpoints/rng_state.pth", "training_args.bin", "logs/999999999_submitted.pkl",
                 "logs/999999999_0_result.pkl", "result.json", "progress.json", "plan.json",
                 "recoveries/2.json", "errors/1.json", "logs/999999999_0_log.out"):  # fmt: skip
        (paths.folder / name).write_bytes(planted)
    for verb in (*VERBS, ("logs", BAD), ("cancel", BAD)):
        assert cli(*verb).code == 0
    paths.job.write_bytes(planted)
    for verb in VERBS:
        assert cli(*verb).code == 0
    assert not Path("canary").exists()


HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e[bold red]x[/bold red] :warning: [/]\\"


@pytest.mark.parametrize("terminal", [True, False])
def test_commands_print_no_control_characters_of_a_run(
    terminal: bool, workplace: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor into a pipe, because a pager may read it."""
    from hpcft.cli import console

    paths = write_run(workplace / "runs", BAD, done=False)
    write_record(paths.errors / "0.json", RankError(
        rank=0, node="n0", at=2.0, kind="ValueError", message=HOSTILE))  # fmt: skip
    (paths.logs / "999999999_0_log.out").write_text(HOSTILE)
    monkeypatch.setattr(console, "on_terminal", lambda _: terminal)
    for verb in (*VERBS, ("logs", BAD)):
        said = cli(*verb)
        assert said.code == 0
        for mark in ("\x1b", "\x07", "\x9b", "\u202e"):
            assert mark not in said.out
        assert "[bold red]x[/bold red] :warning: [/]\\" in said.out.replace("\n", "")
    note = cli("status", "--json").json[0]["note"]
    assert note.isprintable()
    assert "[bold red]x[/bold red] :warning: [/]\\" in note, "readable text is kept"
