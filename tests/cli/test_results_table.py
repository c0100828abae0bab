"""From run folders to rows, pages, and what the command line shows of them."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builders import GIB, MINE, OOM, Cli, Runs, run_plan, run_progress, run_recipe, run_record
from hpcft.cli import console, results_table, status_table, table_formats
from hpcft.config.recipe_types import FullRecipe
from hpcft.core.errors import UsageError
from hpcft.core.records import Baseline, Confusion
from hpcft.jobs import results
from hpcft.scheduler.job_state import JobState


def test_json_has_no_number_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    console.as_json({"loss": math.nan, "all": [1.5, math.inf, (-math.inf, True)]})
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found == {"loss": None, "all": [1.5, None, [None, True]]}


# ---------------------------------------------------------------- rows


def add_done(runs: Runs, run_id: str, made: FullRecipe, accuracy: float, **fields: Any) -> None:
    point = fields.pop("point", {"train.seed": made.train.seed})
    runs.add(run_id, parts=(made, run_record(run_id, accuracy=accuracy)), point=point, **fields)


def test_seeds_are_one_row_with_mean_and_spread(runs: Runs) -> None:
    for seed, accuracy in ((1, 0.80), (2, 0.82), (3, 0.87)):
        # The third was added to the sweep later: another sweep, but the same experiment.
        sweep = "sweep-1" if seed < 3 else "sweep-2"
        add_done(runs, f"aaaa000{seed}", run_recipe(seed), accuracy, sweep_id=sweep)
    (row,) = runs.rows()
    assert row.run_ids == ["aaaa0001", "aaaa0002", "aaaa0003"]
    assert row.point == {}
    header, (cells,) = results_table.table([row])
    shown = dict(zip(header, cells, strict=True))
    assert shown["accuracy"] == "0.8300 ± 0.0361 (n=3)"  # by hand: √((9 + 1 + 16)e-4 / 2)
    assert shown["time"] == "1:00:00"
    assert shown["GPU hours"] == "6.0000"
    assert (shown["memory predicted"], shown["memory measured"]) == ("4 GiB", "3 GiB")
    assert (shown["parameters"], shown["trainable"]) == ("66.4 M", "592 K")


def test_intervals_directions_and_confusion_are_shown(runs: Runs) -> None:
    counts = Confusion(labels=["a", "b"], counts=[[8, 2], [1, 9]])
    result = run_record("aaaa0001", accuracy=0.85, perplexity=3.0).model_copy(
        update={"intervals": {"accuracy": (0.7, 0.95)}, "confusion": counts}
    )
    runs.add("aaaa0001", parts=(run_recipe(1), result))
    header, (cells,) = results_table.table(runs.rows())
    shown = dict(zip(header, cells, strict=True))
    assert (shown["accuracy"], shown["perplexity"]) == ("0.8500 [0.7000, 0.9500]", "3.0000")
    assert {"accuracy ↑", "perplexity ↓", "recipe"} <= set(results_table.with_arrows(header))
    told = results.row_as_json(runs.rows()[0])
    assert told["metrics"]["accuracy"]["intervals"] == [(0.7, 0.95)]
    assert told["confusion"] == [{"labels": ["a", "b"], "counts": [[8, 2], [1, 9]]}]


def test_points_stay_apart(runs: Runs) -> None:
    for index, rate in enumerate((1e-4, 2e-4)):
        for seed in (1, 2):
            add_done(runs, f"aaaa00{index}{seed}", run_recipe(seed, rate), 0.8 + index / 100,
                     point={"train.learning_rate": rate, "train.seed": seed})  # fmt: skip
    rows = runs.rows()
    assert [row.point for row in rows] == [
        {"train.learning_rate": 1e-4}, {"train.learning_rate": 2e-4},
    ]  # fmt: skip
    assert [len(row.run_ids) for row in rows] == [2, 2]
    _, cells = results_table.table(rows)
    assert [line[1] for line in cells] == ["learning_rate=0.0001", "learning_rate=0.0002"]


def test_other_clusters_and_other_data_are_no_repeats(runs: Runs) -> None:
    add_done(runs, "aaaa0001", run_recipe(1), 0.8)
    add_done(runs, "aaaa0002", run_recipe(2), 0.8, cluster="elsewhere")
    data = {"name": "classification", "labels": ["a", "c"], "data": {"path": "x/y"}}
    add_done(runs, "aaaa0003", run_recipe(3, task=data), 0.8)
    rows = runs.rows()
    assert [len(row.run_ids) for row in rows] == [1, 1, 1]
    assert [row.point for row in rows] == [{"train.seed": 1}, {"train.seed": 2}, {"train.seed": 3}]


def test_what_failed_is_shown_with_its_reason(runs: Runs) -> None:
    add_done(runs, "aaaa0001", run_recipe(1), 0.8)
    runs.add("aaaa0002", parts=(run_recipe(2), run_plan()), job_id="12", point={"train.seed": 2},
             log=OOM.format(who=MINE))  # fmt: skip
    runs.add("aaaa0003", parts=(run_recipe(3),), job_id="13", point={"train.seed": 3})
    runs.states = {"12": JobState("FAILED"), "13": JobState("PENDING", "waiting")}
    rows = runs.rows()
    assert [row.state for row in rows] == ["COMPLETED", "FAILED", "PENDING"]
    header, cells = results_table.table(rows)
    failed = dict(zip(header, cells[1], strict=True))
    assert failed["accuracy"] == ""
    assert failed["point"] == "seed=2"
    assert "CUDA out of memory" in failed["note"]
    assert (failed["memory predicted"], failed["parameters"]) == ("70 GiB", "8.54 B")
    assert cells[2][header.index("note")] == "waiting"


def test_baseline_and_before_stand_beside_ours(runs: Runs) -> None:
    reported = Baseline(source="R1", metrics={"accuracy": 0.9382}, outcome="out of memory")
    made = run_recipe(1).model_copy(update={"baseline": reported})
    result = run_record("aaaa0001", accuracy=0.91, f1=0.9, majority=0.5, obscure=1.0)
    scored = result.model_copy(update={"metrics_before": {"accuracy": 0.5123}, "notes": ["cut"]})
    runs.add("aaaa0001", parts=(made, scored))
    header, (cells,) = results_table.table(runs.rows())
    shown = dict(zip(header, cells, strict=True))
    assert shown["accuracy"] == "0.9100"
    assert shown["accuracy before"] == "0.5123"
    assert shown["accuracy reported"] == "0.9382"
    assert (shown["reported outcome"], shown["source"]) == ("out of memory", "R1")
    assert shown["note"] == "cut"
    assert header.index("accuracy reported") < header.index("majority") < header.index("f1")
    assert "f1 before" not in header, "what no row fills is left out"
    assert "obscure" not in header
    chosen, _ = results_table.table(runs.rows(), ["obscure"])
    assert "obscure" in chosen
    assert "accuracy" not in chosen
    with pytest.raises(UsageError, match="no run has the metric f2; there are: accuracy, f1"):
        results_table.table(runs.rows(), ["f2"])


def test_a_run_without_a_readable_recipe_is_shown_too(runs: Runs) -> None:
    paths = runs.add("aaaa0001", parts=(run_record("aaaa0001", accuracy=0.5),))
    paths.recipe.write_text("{")
    (row,) = runs.rows()
    assert row.metrics == {"accuracy": [0.5]}


# ---------------------------------------------------------------- pages


HEADER = ["recipe", "note"]
CELLS = [["made", 'a "b", c\nd | e\tf'], ["x_1 & 50% #$~^\\{}", "0.8 ± 0.1\n\n× 2"]]


def test_tsv_has_a_line_a_row() -> None:
    lines = table_formats.as_tsv(HEADER, CELLS).split("\n")
    assert [line.split("\t") for line in lines] == [
        HEADER, ["made", 'a "b", c d | e f'], ["x_1 & 50% #$~^\\{}", "0.8 ± 0.1 × 2"],
    ]  # fmt: skip
    assert table_formats.as_tsv(["a"], [["x\u2028y\x0bz\r"]]) == "a\nx y z"


def test_csv_reads_back_as_it_was() -> None:
    text = table_formats.as_csv(HEADER, CELLS)
    assert list(csv.reader(io.StringIO(text), strict=True)) == [HEADER, *CELLS]
    assert text.startswith('recipe,note\nmade,"a ""b"", c\nd | e\tf"\n')


def test_markdown_escapes_pipes() -> None:
    lines = table_formats.as_markdown(HEADER, CELLS).split("\n")
    assert lines[:3] == ["| recipe | note |", "| --- | --- |", '| made | a "b", c d \\| e f |']
    assert len(lines) == 4


def test_latex_escapes_what_is_special() -> None:
    lines = table_formats.as_latex(HEADER, CELLS).split("\n")
    assert lines[0] == r"\begin{tabular}{ll}"
    assert lines[4] == r'made & a "b", c d | e f \\'
    assert lines[5] == (
        r"x\_1 \& 50\% \#\$\textasciitilde{}\textasciicircum{}\textbackslash{}\{\} & "
        r"0.8 $\pm$ 0.1 $\times$ 2 \\"
    )
    assert lines[6:] == [r"\bottomrule", r"\end{tabular}"]


# ---------------------------------------------------------------- the command line


@pytest.fixture
def three(runs: Runs) -> Runs:
    """One run done, one running, one failed."""
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


def test_status_for_programs(three: Runs, cli: Cli) -> None:
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


def test_status_of_one_run_and_of_none(three: Runs, cli: Cli) -> None:
    assert [v["run_id"] for v in cli("status", "13", "--json").json] == ["aaaa0003"]
    missing = cli("status", "nope")
    assert missing.code == 2
    assert "no run 'nope' in runs" in missing.err
    empty = cli("status", "--json", "--runs-dir", "elsewhere")
    assert (empty.code, empty.json) == (0, [])


def test_collect_for_programs_is_complete(three: Runs, cli: Cli) -> None:
    done, running, failed = cli("collect", "--json").json
    in_metrics = {"intervals"}  # they stand with their metric
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
def test_collect_formats(name: str, three: Runs, cli: Cli) -> None:
    said = cli("collect", "--format", name)
    assert said.code == 0
    header, *lines = READERS[name](said.out)
    assert header[:4] == ["recipe", "point", "state", "split"]
    assert header[4] == ("accuracy ↑" if name == "md" else "accuracy")
    rows = lines[1:] if name == "md" else lines
    assert [line[2] for line in rows] == ["COMPLETED", "RUNNING", "FAILED"]
    assert rows[0][4] == "0.9100"


def test_collect_as_latex_and_what_is_no_format(three: Runs, cli: Cli) -> None:
    text = cli("collect", "--format", "latex").out
    assert text.count(r"\\") == 4
    refused = cli("collect", "--format", "xml")
    assert refused.code == 2
    assert "expected one of table, json, tsv, csv, md, latex" in refused.err
    absent = cli("collect", "-m", "bleu")
    assert absent.code == 2
    assert "no run has the metric bleu" in absent.err
