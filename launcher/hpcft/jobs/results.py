"""Records to tables: a row a run, repeats as mean ± spread, the baseline beside ours."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hpcft.planning import calibration
from hpcft.core.errors import StoreError, UsageError
from hpcft.config.identity import run_id
from hpcft.metrics.facts import arrow
from hpcft.jobs.status import View, point_text
from hpcft.core.paths import calibration_file
from hpcft.config.recipe import FullRecipe
from hpcft.core.records import (Calibration, Fingerprints, Lowered, Plan, Recovery, RunRecord)
from hpcft.core.files import create_folder, read_if_there, write
from hpcft.core.units import (format_bytes, format_count, format_number, format_seconds)

SEED = "train.seed"
# Shown first, in this order, if a run has them; the rest only in JSON and CSV, or on request.
HEADLINE = ("accuracy", "no_answer", "majority", "exact", "f1", "perplexity", "completion_loss")


@dataclass
class Row:
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
    rungs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Unfinished(NamedTuple):
    """A run without a result that was out of memory, as `hpcft.planning.oom_fallback` knows it."""

    recipe: str
    """Name of the recipe."""
    cluster: str
    """Name of the profile."""
    rungs: Sequence[Recovery]
    """What it came down to so far."""


def rows(views: Iterable[View]) -> list[Row]:
    """The table of the given runs, completed or not: what is missing is said, not left out."""
    groups: dict[str, Row] = {}
    for view in views:
        recipe, key = _recipe_and_experiment(view)
        row = groups.get(key)
        if row is None:
            row = groups[key] = Row(
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
        row.rungs += [rung.change for rung in view.rungs if rung.change not in row.rungs]
        if view.record is not None:
            _add_record(row, view.record)
    return list(groups.values())


def _recipe_and_experiment(view: View) -> tuple[FullRecipe | None, str]:
    """The run's recipe, and what it shares with its repeats: its identity but for the seed.

    By content, not by sweep: a sweep that was enlarged later is still one experiment.
    """
    try:
        recipe = read_if_there(view.paths.recipe, FullRecipe)
        prints = read_if_there(view.paths.fingerprints, Fingerprints)
    except StoreError:
        return None, view.job.run_id
    if recipe is None or view.state != "COMPLETED":
        return recipe, view.job.run_id
    seedless = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": 0})})
    same = run_id(seedless, view.job.cluster, prints.files if prints else {})
    return recipe, f"experiment {same}"


def _add_plan(row: Row, plan: Plan) -> None:
    row.predicted_memory_bytes = plan.gpu_peak_bytes
    row.predicted_step_s = plan.time.step.total_s if plan.time else None
    row.total_parameters = plan.facts.parameters.total
    row.trainable_parameters = plan.facts.parameters.trainable


def _add_record(row: Row, record: RunRecord) -> None:
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


def mean_spread(values: list[float]) -> tuple[float, float | None]:
    """Mean, and the sample standard deviation where there are two values or more."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return statistics.fmean(values), spread


def number(values: list[float], intervals: Sequence[tuple[float, float]] = ()) -> str:
    """`0.8421`, `0.8421 [0.8203, 0.8611]` with its interval, or `0.8421 ± 0.0102 (n=3)`."""
    mean, spread = mean_spread(values)
    if spread is not None:
        return f"{mean:.4f} ± {spread:.4f} (n={len(values)})"
    ends = "".join(f" [{low:.4f}, {high:.4f}]" for low, high in intervals)
    return f"{mean:.4f}{ends}"


def with_arrows(header: list[str]) -> list[str]:
    """The header for people: after a metric, whether higher (`↑`) or lower (`↓`) is better."""
    return [f"{title} {arrow(title)}".rstrip() for title in header]


def table(found: list[Row], metrics: list[str] | None = None) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the results table as text; columns that no row fills are left out.

    Raises:
        UsageError: a metric is asked for that no run has.
    """
    present = {name for row in found for name in (*row.metrics, *row.baseline)}
    absent = [name for name in metrics or () if name not in present]
    if absent:
        known = ", ".join(sorted(present)) or "none"
        raise UsageError(f"no run has the metric {', '.join(absent)}; there are: {known}")
    names = metrics or [name for name in HEADLINE if name in present]
    if not names:
        names = sorted(present)[:4]
    header = ["recipe", "point", "state", "split"]
    body = [
        [row.recipe, point_text(row.point),
         row.state, row.split]
        for row in found
    ]  # fmt: skip
    for name in names:
        columns = [
            (name, [number(row.metrics[name], row.intervals.get(name, ()))
                    if name in row.metrics else "" for row in found]),
            (f"{name} before",
             [number(row.before[name]) if name in row.before else "" for row in found]),
            (f"{name} reported",
             [f"{row.baseline[name]:.4f}" if name in row.baseline else "" for row in found]),
        ]  # fmt: skip
        for title, cells in columns:
            header.append(title)
            for line, cell in zip(body, cells, strict=True):
                line.append(cell)
    rest: dict[str, Callable[[Row], str]] = {
        "reported outcome": lambda r: r.baseline_outcome,
        "parameters": lambda r: format_count(r.total_parameters),
        "trainable": lambda r: format_count(r.trainable_parameters),
        "time": lambda r: format_seconds(sum(r.wall_s) / len(r.wall_s)) if r.wall_s else "",
        "GPU hours": lambda r: f"{sum(r.gpu_hours):.4f}" if r.gpu_hours else "",
        "memory predicted": lambda r: format_bytes(r.predicted_memory_bytes),
        "memory measured": lambda r: format_bytes(r.peak_memory_bytes),
        "step predicted": lambda r: _seconds(r.predicted_step_s) if r.step_s else "",
        "step measured": lambda r: _seconds(statistics.median(r.step_s)) if r.step_s else "",
        "rungs": lambda r: ", ".join(r.rungs),
        "source": lambda r: r.baseline_source,
        "note": lambda r: r.note or "; ".join(r.notes),
    }
    for title, shown in rest.items():
        header.append(title)
        for line, row in zip(body, found, strict=True):
            line.append(shown(row))
    used = [i for i, _ in enumerate(header) if any(line[i] for line in body) or i == 0]
    return [header[i] for i in used], [[line[i] for i in used] for line in body]


def _seconds(duration_s: float | None) -> str:
    return "" if duration_s is None else f"{format_number(duration_s)} s"


def learn(views: Sequence[View], root: Path) -> list[str]:
    """Keeps what the runs have measured of their clusters; what is new, in a line for each.

    Args:
        views: all runs of the runs folder: what others measured would be forgotten.
        root: the runs folder.

    Raises:
        OSError: it cannot be written to.
        StoreError: likewise, or others may write to it.
    """
    records = [view.record for view in views if view.record is not None]
    unfinished = [
        Unfinished(view.job.recipe, view.job.cluster, view.rungs)
        for view in views
        if view.record is None and view.rungs
    ]
    told = []
    clusters = {record.cluster for record in records} | {run.cluster for run in unfinished}
    for cluster in sorted(clusters - {""}):
        fitted = calibration.fit(records, cluster, unfinished)
        file = calibration_file(root, cluster)
        try:
            earlier = read_if_there(file, Calibration) or Calibration()
        except StoreError:
            earlier = None  # damaged: written anew
        if fitted == earlier:
            continue
        create_folder(file.parent)
        write(file, fitted)
        parts = [calibration.in_words(fitted)] if calibration.in_words(fitted) else []
        parts += [f"{name} came down to {_cap(cap)}" for name, cap in fitted.lowered.items()]
        by = f"{fitted.runs} run{'s' * (fitted.runs != 1)}"
        told.append(f"calibration of {cluster} by {by}: {'; '.join(parts) or 'none'}")
    return told


def _cap(cap: Lowered) -> str:
    parts = [f"micro-batch {cap.per_device_train_batch_size}"]
    parts += ["checkpointing"] * cap.gradient_checkpointing
    parts += [f"loss in {cap.loss_chunks} parts"] * (cap.loss_chunks > 1)
    parts += [f"{cap.nodes} nodes"] * (cap.nodes > 1)
    return ", ".join(parts)


def as_json(row: Row) -> dict[str, Any]:
    """A row for programs: every metric with its mean, spread, single values and their intervals."""

    def summary(metrics: dict[str, list[float]]) -> dict[str, Any]:
        return {
            name: {"mean": mean_spread(v)[0], "stdev": mean_spread(v)[1], "values": v}
            for name, v in metrics.items()
        }

    shown = {**vars(row), "metrics": summary(row.metrics), "before": summary(row.before)}
    for name, intervals in shown.pop("intervals").items():
        shown["metrics"][name]["intervals"] = intervals
    return shown
