"""Run folders of hpcft 0.1: everything that reads or continues them still does the right thing.

`data/release_0_1` was written by hpcft 0.1: completed runs, a sweep, a failed run, one whose ranks
had restarted before it was killed, one after an out-of-memory fallback, and two on Slurm. Weights,
logs and pickles are left out; paths and host names are filled in here.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from builders import ROOT, Cli, film_rows, llama_folder, write_rows
from hpcft.core.records import Plan
from hpcft.recovery.run import Run

RECORDED = ROOT / "tests" / "data" / "release_0_1"
COMPLETED = {"941fc4e1b936", "040e66c03b6d", "0025725f8c64", "5d81d407e69d"}
# Parts of records that are records themselves, by the key under which they stand.
PARTS = {"layout", "facts", "parameters", "time", "step", "measured", "predicted", "attempts",
         "gpu_memory", "host_memory", "recoveries"}  # fmt: skip


def with_one_key_more(value: Any, *, is_record: bool = True) -> Any:
    """Returns a record, and those inside it, as a newer hpcft might write them."""
    if isinstance(value, list):
        return [with_one_key_more(part, is_record=is_record) for part in value]
    if not (isinstance(value, dict) and is_record):
        return value
    parts = {k: with_one_key_more(v, is_record=k in PARTS) for k, v in value.items()}
    return parts | {"added_by_a_newer_release": {"some": [1, None]}}


@pytest.fixture(params=["as written", "one key more"])
def folder(request: pytest.FixtureRequest, workplace: Path) -> Path:
    """The recorded runs folder in the current folder, with the data that the recipes name."""
    shutil.copytree(RECORDED, workplace, dirs_exist_ok=True)
    rows = film_rows(12)
    write_rows(workplace / "train.jsonl", rows)
    write_rows(workplace / "test.jsonl", rows[:8])
    for split, noun, count in (("train", "film", 24), ("test", "play", 300)):
        texts = [f"a {noun}, number {n}{' indeed' * (n % 7)}" for n in range(count)]
        rows = [{"text": text, "label": n % 2} for n, text in enumerate(texts)]
        write_rows(workplace / f"{split}_asked.jsonl", rows)
    for file in workplace.rglob("*"):
        if file.is_dir():
            file.chmod(0o700)
        elif file.suffix in (".json", ".jsonl", ".yaml") and "prepared" not in file.parts:
            text = file.read_text().replace("@WORK@", str(workplace))
            file.write_text(text.replace("@HOST@", os.uname().nodename))
    if request.param == "one key more":
        for file in (workplace / "runs").rglob("*.json"):
            if "prepared" not in file.parts:
                file.write_text(json.dumps(with_one_key_more(json.loads(file.read_text()))))
    return workplace


def recorded(name: str) -> dict[str, dict[str, Any]]:
    """What hpcft 0.1 said of the runs, by run id."""
    rows = json.loads((RECORDED / f"{name}.json").read_text())
    return {row.get("run_id") or row["run_ids"][0]: row for row in rows}


@pytest.mark.usefixtures("folder")
def test_status_of_0_1_runs_is_as_it_was(cli: Cli) -> None:
    now = {row["run_id"]: row for row in cli("status", "--json").json}
    before = recorded("status")
    assert before.keys() < now.keys()
    for run_id, row in before.items():
        if run_id == "b0666b38e694":  # its Slurm is gone: nobody knows, and it is not left out
            assert now[run_id]["state"] == "UNKNOWN"
            continue
        assert now[run_id]["state"] == row["state"]
        assert now[run_id]["point"] == row["point"]
        assert now[run_id]["elapsed_s"] == row["elapsed_s"]
    broken = now["3bf9fe5f436b"]["failure"]
    assert (broken["class"], broken["rank"]) == ("user", 0)
    assert "a person made this mistake" in broken["evidence"]


@pytest.mark.usefixtures("folder")
def test_collect_of_0_1_runs_has_the_same_numbers(cli: Cli) -> None:
    now = {row["run_ids"][0]: row for row in cli("collect", "--json").json}
    for run_id, row in recorded("collect").items():
        for field in ("metrics", "before", "split", "wall_s", "gpu_hours", "step_s",
                      "peak_memory_bytes", "predicted_memory_bytes"):  # fmt: skip
            assert now[run_id][field] == row[field], (run_id, field)


@pytest.mark.usefixtures("folder")
def test_explain_of_a_failed_0_1_run_names_the_error(cli: Cli) -> None:
    said = cli("explain", "broken")
    assert "a person made this mistake" in said.out


def test_submitting_a_completed_0_1_run_finds_it(folder: Path, cli: Cli) -> None:
    jobs = {run: (folder / run / "job.json").read_text()
            for run in ("runs/tiny/941fc4e1b936", "runs/seeds/040e66c03b6d",
                        "runs/seeds/0025725f8c64")}  # fmt: skip
    for recipe in ("tiny.yaml", "seeds.yaml"):
        said = cli("submit", recipe, "-c", "local")
        assert said.code == 0
        assert "completed" in said.out + said.err
    assert jobs == {run: (folder / run / "job.json").read_text() for run in jobs}


def test_a_0_1_fallback_runs_its_layout_without_the_predictions_of_another(folder: Path) -> None:
    run = Run.open(folder / "runs" / "lowered" / "feed0000cafe")
    (recovery,) = run.read_recoveries()
    assert (recovery.action, recovery.change) == ("restart", "micro-batch 4 → 2")
    plan: Plan = run.read_plan()
    assert plan.layout.per_device_train_batch_size == 2
    assert (plan.gpu_peak_bytes, plan.time) == (None, None)


@pytest.mark.process
def test_resuming_a_killed_0_1_run_completes_it(folder: Path, cli: Cli) -> None:
    """Its ranks had restarted once; 52 of 300 prompts were answered when it was killed."""
    llama_folder(folder / "base")
    run = folder / "runs" / "asked" / "7122f1e1c01e"
    answered = {file.name: file.read_text() for file in (run / "answers").glob("*.jsonl")}
    said = cli("resume", "asked", "--watch")
    assert said.code == 0, said.err
    result = json.loads((run / "result.json").read_text())
    assert result["examples"]["test"] == 300
    for name, text in answered.items():
        assert (run / "answers" / name).read_text().startswith(text), "answers are kept"
    actions = [recovery["action"] for recovery in result["recoveries"]]
    assert actions == ["restart", "resume"]
