"""Tests of the results table: from run folders to rows, and from rows to text."""

from __future__ import annotations

from typing import Any

import pytest

from builders import MINE, OOM, Runs, run_plan, run_recipe, run_record
from hpcft.cli import results_table
from hpcft.config.recipe_types import FullRecipe
from hpcft.core.errors import UsageError
from hpcft.core.records import Baseline, Confusion
from hpcft.jobs import results
from hpcft.scheduler.job_state import JobState


def add_done(runs: Runs, run_id: str, made: FullRecipe, accuracy: float, **fields: Any) -> None:
    point = fields.pop("point", {"train.seed": made.train.seed})
    runs.add(run_id, parts=(made, run_record(run_id, accuracy=accuracy)), point=point, **fields)


def test_table_of_seeds_has_one_row_with_mean_and_deviation(runs: Runs) -> None:
    for seed, accuracy in ((1, 0.80), (2, 0.82), (3, 0.87)):
        # The third seed was added later, which makes another sweep of the same experiment.
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


def test_table_of_one_run_shows_intervals_and_directions(runs: Runs) -> None:
    counts = Confusion(labels=["a", "b"], counts=[[8, 2], [1, 9]])
    result = run_record("aaaa0001", accuracy=0.85, perplexity=3.0).model_copy(
        update={"intervals": {"accuracy": (0.7, 0.95)}, "confusion": counts}
    )
    runs.add("aaaa0001", parts=(run_recipe(1), result))
    header, (cells,) = results_table.table(runs.rows())
    shown = dict(zip(header, cells, strict=True))
    assert (shown["accuracy"], shown["perplexity"]) == ("0.8500 [0.7000, 0.9500]", "3.0000")
    assert {"accuracy ↑", "perplexity ↓", "recipe"} <= set(results_table.with_arrows(header))
    row = results.row_as_json(runs.rows()[0])
    assert row["metrics"]["accuracy"]["intervals"] == [(0.7, 0.95)]
    assert row["confusion"] == [{"labels": ["a", "b"], "counts": [[8, 2], [1, 9]]}]


def test_table_of_a_sweep_has_a_row_for_each_point(runs: Runs) -> None:
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


def test_rows_of_other_clusters_or_data_are_not_repeats(runs: Runs) -> None:
    add_done(runs, "aaaa0001", run_recipe(1), 0.8)
    add_done(runs, "aaaa0002", run_recipe(2), 0.8, cluster="elsewhere")
    data = {"name": "classification", "labels": ["a", "c"], "data": {"path": "x/y"}}
    add_done(runs, "aaaa0003", run_recipe(3, task=data), 0.8)
    rows = runs.rows()
    assert [len(row.run_ids) for row in rows] == [1, 1, 1]
    assert [row.point for row in rows] == [{"train.seed": 1}, {"train.seed": 2}, {"train.seed": 3}]


def test_rows_of_one_recipe_are_told_apart_by_what_differs(runs: Runs) -> None:
    """Runs with other values by `-o` have no swept values: their rows had the same name."""
    add_done(runs, "aaaa0001", run_recipe(1, 1e-4), 0.5, point={})
    add_done(runs, "aaaa0002", run_recipe(1, 2e-4), 0.6, point={})
    method = {"name": "lora", "r": 4}
    add_done(runs, "aaaa0003", run_recipe(1, 1e-4, method=method), 0.7, point={})
    add_done(runs, "aaaa0004", run_recipe(1, 1e-4), 0.8, point={}, cluster="elsewhere")
    header, cells = results_table.table(runs.rows())
    points = [line[header.index("point")] for line in cells]
    assert len({*points}) == 4
    assert "learning_rate=0.0002" in points[1]
    assert "name=lora" in points[2]
    assert "cluster=elsewhere" in points[3]
    assert runs.rows()[1].changes["train.learning_rate"] == 2e-4


def test_rows_whose_recipe_is_the_same_are_told_apart_by_run(runs: Runs) -> None:
    """Their data differ, or they have failed with another seed."""
    for run_id, job_id in (("aaaa0001", "11"), ("aaaa0002", "12")):
        runs.add(run_id, parts=(run_recipe(1),), job_id=job_id)
    runs.states = {"11": JobState("FAILED"), "12": JobState("FAILED")}
    assert [row.changes for row in runs.rows()] == [{"run": "aaaa0001"}, {"run": "aaaa0002"}]


def test_table_shows_the_number_of_scored_examples_and_the_time_of_training(runs: Runs) -> None:
    done = run_record("aaaa0001", accuracy=0.85)
    assert done.measured
    measured = done.measured.model_copy(update={"train_s": 1800.0})
    examples = {"train": 9000, "test": 1821}
    update = {"examples": examples, "measured": measured}
    runs.add("aaaa0001", parts=(run_recipe(1), done.model_copy(update=update)))
    header, (cells,) = results_table.table(runs.rows())
    shown = dict(zip(header, cells, strict=True))
    assert (shown["split"], shown["examples"]) == ("test", "1,821")
    assert (shown["time"], shown["of it training"]) == ("1:00:00", "0:30:00"[2:])


def test_table_of_a_failed_run_shows_the_reason(runs: Runs) -> None:
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


def test_table_shows_published_results_and_scores_before_training(runs: Runs) -> None:
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
    assert "f1 before" not in header, "a column without any text is left out"
    assert "obscure" not in header
    header, _ = results_table.table(runs.rows(), ["obscure"])
    assert "obscure" in header
    assert "accuracy" not in header
    with pytest.raises(UsageError, match="no run has the metric f2; there are: accuracy, f1"):
        results_table.table(runs.rows(), ["f2"])


def test_rows_of_a_run_with_a_damaged_recipe_has_its_metrics(runs: Runs) -> None:
    paths = runs.add("aaaa0001", parts=(run_record("aaaa0001", accuracy=0.5),))
    paths.recipe.write_text("{")
    (row,) = runs.rows()
    assert row.metrics == {"accuracy": [0.5]}
