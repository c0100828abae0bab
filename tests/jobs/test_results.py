"""Rows of results; the table of them is tested with the command line."""

from __future__ import annotations

from typing import Any

from builders import GIB, Runs, run_plan, run_recipe, run_record, write_recovery
from hpcft.core.records import Measurement, PhasePeaks
from hpcft.jobs.results import format_metric, row_as_json
from hpcft.scheduler.job_state import JobState


def measured(peak_host_gib: int, allocated_gib: int) -> Measurement:
    """Returns a measurement with these peaks."""
    peaks = PhasePeaks(resident_bytes=GIB, allocated_bytes=allocated_gib * GIB)
    return Measurement(wall_s=60.0, train_s=50.0, gpu_hours=1.0, peak_memory_bytes=3 * GIB,
                       peak_host_bytes=peak_host_gib * GIB, phases={"training": peaks})  # fmt: skip


def test_result_rows_hold_the_largest_peaks_and_all_versions(runs: Runs) -> None:
    for seed, torch in ((1, "2.9.0"), (2, "2.9.1"), (3, "2.9.1")):
        update: dict[str, Any] = {
            "measured": measured(peak_host_gib=4 + seed, allocated_gib=2 * seed),
            "versions": {"torch": torch, "peft": "0.18.0"},
            "examples": {"test": 8},
        }
        record = run_record(f"aaaa000{seed}", accuracy=0.9).model_copy(update=update)
        runs.add(f"aaaa000{seed}", parts=(run_recipe(seed), record))
    (row,) = runs.rows()
    shown = row_as_json(row)
    assert shown["peak_host_bytes"] == 7 * GIB
    assert shown["phases"]["training"]["allocated_bytes"] == 6 * GIB
    assert (shown["wall_s"], shown["train_s"]) == ([60.0] * 3, [50.0] * 3)
    assert (shown["tokens_per_s"], shown["step_s"]) == ([], [])
    assert shown["examples"] == {"test": 8}
    assert shown["versions"] == {"torch": ["2.9.0", "2.9.1"], "peft": ["0.18.0"]}


def test_result_rows_after_a_fallback_hold_no_prediction(runs: Runs) -> None:
    paths = runs.add("aaaa0000", parts=(run_plan(), run_recipe()))
    runs.states = {"11": JobState("RUNNING")}
    assert runs.rows()[0].predicted_memory_bytes == 70 * GIB
    write_recovery(paths, step=3, change="micro-batch 2 → 1")
    (row,) = runs.rows()
    assert (row.predicted_memory_bytes, row.fallbacks) == (None, ["micro-batch 2 → 1"])


def test_result_rows_of_a_damaged_run_say_why(runs: Runs) -> None:
    runs.add("aaaa0000", parts=(run_recipe(1),)).result.write_text("{")
    runs.add("aaaa0001", parts=(run_recipe(2), run_record("aaaa0001", f1=1.0))).job.write_text("{")
    runs.add("aaaa0002", parts=(run_recipe(3), run_record("aaaa0002", f1=1.0)), job_id="12")
    runs.states = {"11": JobState("COMPLETED")}
    rows = {row.run_ids[0]: row for row in runs.rows()}
    assert {run_id: row.state for run_id, row in rows.items()} == {
        "aaaa0000": "UNKNOWN", "aaaa0001": "UNKNOWN", "aaaa0002": "COMPLETED",
    }  # fmt: skip
    assert "result.json: is damaged" in rows["aaaa0000"].note
    assert "job.json: is damaged" in rows["aaaa0001"].note
    assert rows["aaaa0001"].metrics == {}


def test_format_metric_of_several_runs_has_mean_and_std() -> None:
    assert format_metric([0.5]) == "0.5000"
    assert format_metric([0.5], [(0.25, 0.75)]) == "0.5000 [0.2500, 0.7500]"
    assert format_metric([0.80, 0.82, 0.87]) == "0.8300 ± 0.0361 (n=3)"
