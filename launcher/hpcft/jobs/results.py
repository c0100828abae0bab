"""Records to tables: a row a run, repeats as mean ± spread, the baseline beside ours."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpcft.config.identity import compute_run_id
from hpcft.config.recipe_types import FullRecipe
from hpcft.core.errors import StoreError
from hpcft.core.files import read_record_if_exists
from hpcft.core.records import Fingerprints, Plan, RunRecord
from hpcft.jobs.status import RunStatus

SEED = "train.seed"


@dataclass
class ResultRow:
    """One line of the results table: a run, or several that differ in their seed only."""

    recipe: str
    point: dict[str, Any]
    run_ids: list[str]
    state: str
    note: str = ""
    split: str = ""
    metrics: dict[str, list[float]] = field(default_factory=dict)
    before: dict[str, list[float]] = field(default_factory=dict)
    intervals: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    confusion: list[dict[str, Any]] = field(default_factory=list)
    baseline: dict[str, float] = field(default_factory=dict)
    baseline_source: str = ""
    baseline_outcome: str = ""
    total_parameters: int | None = None
    trainable_parameters: int | None = None
    wall_s: list[float] = field(default_factory=list)
    gpu_hours: list[float] = field(default_factory=list)
    predicted_memory_bytes: int | None = None
    peak_memory_bytes: int | None = None
    phases: dict[str, dict[str, int]] = field(default_factory=dict)
    predicted_step_s: float | None = None
    step_s: list[float] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def result_rows(views: Iterable[RunStatus]) -> list[ResultRow]:
    """The table of the given runs, completed or not: what is missing is said, not left out."""
    groups: dict[str, ResultRow] = {}
    for view in views:
        recipe, key = _recipe_and_experiment(view)
        row = groups.get(key)
        if row is None:
            row = groups[key] = ResultRow(
                view.job.recipe, dict(view.job.point), [], view.state, view.note
            )
            if view.plan:
                _add_plan(row, view.plan)
            if recipe and recipe.baseline:
                row.baseline = dict(recipe.baseline.metrics)
                row.baseline_source = recipe.baseline.source
                row.baseline_outcome = recipe.baseline.outcome or ""
        else:
            row.point.pop(SEED, None)
        row.run_ids.append(view.job.run_id)
        row.fallbacks += [
            rung.change for rung in view.fallbacks if rung.change not in row.fallbacks
        ]
        if view.record is not None:
            _add_record(row, view.record)
    return list(groups.values())


def _recipe_and_experiment(view: RunStatus) -> tuple[FullRecipe | None, str]:
    """The run's recipe, and what it shares with its repeats: its identity but for the seed.

    By content, not by sweep: a sweep that was enlarged later is still one experiment.
    """
    try:
        recipe = read_record_if_exists(view.paths.recipe, FullRecipe)
        prints = read_record_if_exists(view.paths.fingerprints, Fingerprints)
    except StoreError:
        return None, view.job.run_id
    if recipe is None or view.state != "COMPLETED":
        return recipe, view.job.run_id
    seedless = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": 0})})
    same = compute_run_id(seedless, view.job.cluster, prints.files if prints else {})
    return recipe, f"experiment {same}"


def _add_plan(row: ResultRow, plan: Plan) -> None:
    row.predicted_memory_bytes = plan.gpu_peak_bytes
    row.predicted_step_s = plan.time.step.total_s if plan.time else None
    row.total_parameters = plan.facts.parameters.total
    row.trainable_parameters = plan.facts.parameters.trainable


def _add_record(row: ResultRow, record: RunRecord) -> None:
    row.split = record.split
    for name, value in record.metrics.items():
        row.metrics.setdefault(name, []).append(value)
    for name, value in record.metrics_before.items():
        row.before.setdefault(name, []).append(value)
    for name, interval in record.intervals.items():
        row.intervals.setdefault(name, []).append(interval)
    if record.confusion:
        row.confusion.append(record.confusion.model_dump())
    row.notes += [note for note in record.notes if note not in row.notes]
    if record.predicted_memory_bytes is not None:
        row.predicted_memory_bytes = record.predicted_memory_bytes
    if record.parameters:
        row.total_parameters = record.parameters.total
        row.trainable_parameters = record.parameters.trainable
    if record.predicted:
        row.predicted_step_s = record.predicted.step_s
    if record.measured:
        row.wall_s.append(record.measured.wall_s)
        row.gpu_hours.append(record.measured.gpu_hours)
        row.peak_memory_bytes = max(row.peak_memory_bytes or 0, record.measured.rank_bytes)
        if record.measured.step_s is not None:
            row.step_s.append(record.measured.step_s)
        for phase, peaks in record.measured.phases.items():
            known = row.phases.setdefault(phase, {})
            for name, value in peaks.model_dump(exclude_none=True).items():
                known[name] = max(value, known.get(name, 0))


def mean_std(values: list[float]) -> tuple[float, float | None]:
    """Mean, and the sample standard deviation where there are two values or more."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return statistics.fmean(values), spread


def format_metric(values: list[float], intervals: Sequence[tuple[float, float]] = ()) -> str:
    """`0.8421`, `0.8421 [0.8203, 0.8611]` with its interval, or `0.8421 ± 0.0102 (n=3)`."""
    mean, spread = mean_std(values)
    if spread is not None:
        return f"{mean:.4f} ± {spread:.4f} (n={len(values)})"
    ends = "".join(f" [{low:.4f}, {high:.4f}]" for low, high in intervals)
    return f"{mean:.4f}{ends}"


def row_as_json(row: ResultRow) -> dict[str, Any]:
    """A row for programs: every metric with its mean, spread, single values and their intervals."""

    def summary(metrics: dict[str, list[float]]) -> dict[str, Any]:
        return {
            name: {"mean": mean_std(v)[0], "stdev": mean_std(v)[1], "values": v}
            for name, v in metrics.items()
        }

    shown = {**vars(row), "metrics": summary(row.metrics), "before": summary(row.before)}
    for name, intervals in shown.pop("intervals").items():
        shown["metrics"][name]["intervals"] = intervals
    return shown
