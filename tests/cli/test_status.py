"""Tests of `hpcft status` and `hpcft collect`: tables, JSON and other formats."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import GIB, Cli, Runs, run_progress, run_recipe, run_record
from hpcft.cli import status_table
from hpcft.core.records import Baseline
from hpcft.jobs import results
from hpcft.scheduler.job_state import JobState


@pytest.fixture
def three(runs: Runs) -> Runs:
    """Three runs: completed, running and failed."""
    reported = run_recipe(1).model_copy(
        update={"baseline": Baseline(source="R1", metrics={"f1": 0.7})}
    )
    runs.add("aaaa0001", parts=(reported, run_record("aaaa0001", accuracy=0.91)))
    runs.add("aaaa0002", parts=(run_recipe(2, 1e-5), run_progress()), job_id="12",
             point={"train.learning_rate": 1e-5})  # fmt: skip
    runs.add("aaaa0003", parts=(run_recipe(3, 1e-6),), job_id="13",
             errors=(("ValueError", "two\nlines\tand a tab"),))  # fmt: skip
    runs.states = {"12": JobState("RUNNING", nodes="n7", elapsed_s=93784.0),
                   "13": JobState("FAILED", exit_code="1:0")}  # fmt: skip
    return runs


def test_status_as_json_has_the_records(three: Runs, cli: Cli) -> None:
    said = cli("status", "--json")
    assert (said.code, said.err) == (0, "")
    done, running, failed = said.json
    assert (done["state"], running["state"], failed["state"]) == ("COMPLETED", "RUNNING", "FAILED")
    assert running["progress"]["loss"] == 0.51234
    assert running["elapsed_s"] == 93784.0
    assert running["folder"] == str(three.root.relative_to(Path.cwd()) / "made" / "aaaa0002")
    assert failed["note"].startswith("user: rank 0 on n0: ValueError: two")
    assert done["progress"] is None


def test_status_in_a_pipe_is_tsv(three: Runs, cli: Cli) -> None:
    said = cli("status")
    header, *lines = [line.split("\t") for line in said.out.splitlines()]
    assert header == [column.title for column in status_table.COLUMNS]
    assert [len(line) for line in lines] == [len(header)] * 3
    shown = dict(zip(header, lines[1], strict=True))
    assert shown | {"note": ""} == {
        "run": "made/aaaa0002", "point": "learning_rate=1e-05", "cluster": "site", "job": "12",
        "state": "RUNNING", "nodes": "n7", "elapsed": "26:03:04", "progress": "██░░░░░░░░ 25%",
        "step": "30/120", "loss": "0.5123", "tokens/s": "12,346", "memory (peak)": "1 GiB (2 GiB)",
        "ETA": "1:15", "note": "",
    }  # fmt: skip
    assert "\x1b" not in said.out


def test_status_of_a_missing_run_is_refused(three: Runs, cli: Cli) -> None:
    assert [v["run_id"] for v in cli("status", "13", "--json").json] == ["aaaa0003"]
    missing = cli("status", "nope")
    assert missing.code == 2
    assert "there is no run 'nope' in runs; to list all: hpcft status" in missing.err
    empty = cli("status", "--json", "--runs-dir", "elsewhere")
    assert (empty.code, empty.json) == (0, [])


def test_collect_as_json_has_every_field(three: Runs, cli: Cli) -> None:
    done, running, failed = cli("collect", "--json").json
    in_metrics = {"intervals"}  # JSON has the intervals with their metrics.
    assert set(done) == set(results.ResultRow.__dataclass_fields__) - in_metrics
    assert done["metrics"] == {"accuracy": {"mean": 0.91, "stdev": None, "values": [0.91]}}
    assert done["baseline"] == {"f1": 0.7}
    assert (done["total_parameters"], done["peak_memory_bytes"]) == (66_364_418, 3 * GIB)
    assert (running["state"], failed["state"]) == ("RUNNING", "FAILED")
    assert cli("collect", "--format", "json").json == [done, running, failed]


READERS: dict[str, Callable[[str], list[list[str]]]] = {
    "table": lambda text: [line.split("\t") for line in text.splitlines()],
    "tsv": lambda text: [line.split("\t") for line in text.splitlines()],
    "csv": lambda text: list(csv.reader(io.StringIO(text), strict=True)),
    "md": lambda text: [line.strip("| ").split(" | ") for line in text.splitlines()],
}


@pytest.mark.parametrize("name", READERS)
def test_collect_in_a_format_has_a_row_for_each_run(name: str, three: Runs, cli: Cli) -> None:
    said = cli("collect", "--format", name)
    assert said.code == 0
    header, *lines = READERS[name](said.out)
    assert header[:4] == ["recipe", "point", "state", "split"]
    assert header[4] == ("accuracy ↑" if name == "md" else "accuracy")
    rows = lines[1:] if name == "md" else lines
    assert [line[2] for line in rows] == ["COMPLETED", "RUNNING", "FAILED"]
    assert rows[0][4] == "0.9100"


def test_collect_in_an_unknown_format_is_refused(three: Runs, cli: Cli) -> None:
    text = cli("collect", "--format", "latex").out
    assert text.count(r"\\") == 4
    refused = cli("collect", "--format", "xml")
    assert refused.code == 2
    assert "expected one of table, json, tsv, csv, md, latex" in refused.err
    absent = cli("collect", "-m", "bleu")
    assert absent.code == 2
    assert "no run has the metric bleu" in absent.err
