"""Turns runs into rows of results: repeats as mean ± spread, baselines beside measurements."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from hpcft.config.identity import compute_run_id
from hpcft.config.recipe_types import FullRecipe
from hpcft.core import folder_index
from hpcft.core.errors import StoreError
from hpcft.core.files import read_record_if_exists
from hpcft.core.records import Fingerprints, Measurement, RunRecord, StoredRecord
from hpcft.jobs import row_names
from hpcft.jobs.indexed_runs import IndexedStatus
from hpcft.jobs.status import RunStatus

SEED = "train.seed"


@dataclass(kw_only=True)
class ResultRow:
    """One row of results: a run, or several that differ in their seed only."""

    recipe: str
    """Name of the recipe."""
    point: dict[str, Any]
    """Values of the swept fields, without the seed if the row has several runs."""
    run_ids: list[str]
    """Runs of the row."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Other values that tell the row from those of the same recipe, for example those of `-o`."""
    state: str
    """State, as in the status of a run."""
    note: str = ""
    """Why the run is pending, failed or unknown."""
    split: str = ""
    """Split that the metrics are of."""
    examples: dict[str, int] = field(default_factory=dict)
    """Split to its number of examples."""
    metrics: dict[str, list[float]] = field(default_factory=dict)
    """Metric to its value in each run, after training."""
    before: dict[str, list[float]] = field(default_factory=dict)
    """Metric to its value in each run, before training."""
    intervals: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Metric to the ends of its 95 % interval in each run."""
    confusion: list[dict[str, Any]] = field(default_factory=list)
    """Confusion matrix of each run."""
    baseline: dict[str, float] = field(default_factory=dict)
    """Metric to its reported value."""
    baseline_source: str = ""
    """Source of the reported values."""
    baseline_outcome: str = ""
    """Reported outcome in words, for example `out of memory`."""
    total_parameters: int | None = None
    """Parameters of the model."""
    trainable_parameters: int | None = None
    """Parameters that are trained."""
    wall_s: list[float] = field(default_factory=list)
    """Seconds that the jobs of each run took, with start-up: what is charged."""
    train_s: list[float] = field(default_factory=list)
    """Seconds of training alone in each run that trained."""
    gpu_hours: list[float] = field(default_factory=list)
    """GPU hours of each run."""
    tokens_per_s: list[float] = field(default_factory=list)
    """Training tokens per second over all ranks of each run that trained."""
    predicted_memory_bytes: int | None = None
    """Predicted peak of a rank; None after a fallback."""
    peak_memory_bytes: int | None = None
    """Largest measured peak of a rank."""
    peak_host_bytes: int | None = None
    """Largest measured host memory of a node's ranks together."""
    phases: dict[str, dict[str, int]] = field(default_factory=dict)
    """Phase to its measured peaks, by kind of memory; of all runs the largest."""
    predicted_step_s: float | None = None
    """Predicted seconds of an optimizer step."""
    step_s: list[float] = field(default_factory=list)
    """Measured seconds of an optimizer step in each run."""
    fallbacks: list[str] = field(default_factory=list)
    """Changes of the layout that a lack of memory made necessary."""
    versions: dict[str, list[str]] = field(default_factory=dict)
    """Package to the versions that computed the numbers: one if all runs used the same."""
    notes: list[str] = field(default_factory=list)
    """Remarks on the numbers, for example texts that were cut."""


class RunFacts(StoredRecord):
    """Facts of a run that a row shows besides its result: from its recipe and its plan."""

    experiment: str
    """Key that the run shares with its repeats."""
    baseline: dict[str, float] = Field(default_factory=dict)
    """Metric to its reported value."""
    baseline_source: str = ""
    """Source of the reported values."""
    baseline_outcome: str = ""
    """Reported outcome in words."""
    predicted_memory_bytes: int | None = None
    """Predicted peak of a rank; None after a fallback."""
    predicted_step_s: float | None = None
    """Predicted seconds of an optimizer step."""
    total_parameters: int | None = None
    """Parameters of the model."""
    trainable_parameters: int | None = None
    """Parameters that are trained."""


_FACTS = "row"
"""Kind of the texts in the index that are the facts of runs."""


def result_rows(runs: Iterable[RunStatus]) -> list[ResultRow]:
    """Returns the rows of the given runs, completed or not: no run is left out."""
    rows: dict[str, ResultRow] = {}
    first: list[RunStatus] = []
    for run, facts in _with_facts(list(runs)):
        row = rows.get(facts.experiment)
        if row is None:
            row = rows[facts.experiment] = _new_row(run, facts)
            first.append(run)
        else:
            row.point.pop(SEED, None)
        row.run_ids.append(run.job.run_id)
        row.fallbacks += [f.change for f in run.fallbacks if f.change not in row.fallbacks]
        if run.is_completed and run.record is not None:
            _add_record(row, run.record)
        if isinstance(run, IndexedStatus):
            run.forget()
    _tell_apart(list(zip(rows.values(), first, strict=True)))
    return list(rows.values())


def _tell_apart(rows: list[tuple[ResultRow, RunStatus]]) -> None:
    """Notes the differences of rows that would have the same name in the table."""
    groups: dict[str, list[tuple[ResultRow, RunStatus]]] = {}
    for item in rows:
        groups.setdefault(f"{item[0].recipe} {item[0].point}", []).append(item)
    for group in groups.values():
        if len(group) > 1:
            runs = [
                (run.job.run_id, run.job.cluster, _recipe_and_experiment(run)[0])
                for _, run in group
            ]
            differing = row_names.differences(runs, [*group[0][0].point])
            for (row, _), changes in zip(group, differing, strict=True):
                row.changes = changes


def _with_facts(runs: Sequence[RunStatus]) -> Iterator[tuple[RunStatus, RunFacts]]:
    """Yields each run with its facts: those of finished runs from the index, if it has them."""
    finished = [run for run in runs if isinstance(run, IndexedStatus)]
    known = {root: folder_index.load(root, _FACTS) for root in {run.found.root for run in finished}}
    new: dict[Path, dict[str, tuple[str, str]]] = {}
    for run in runs:
        if not isinstance(run, IndexedStatus):
            yield run, _read_facts(run)
            continue
        found, folder = run.found, str(run.paths.folder)
        signature = found.signature + folder_index.signature(folder, _FACT_FILES)
        then, text = known[found.root].get(found.name, ("", ""))
        if signature == then:
            with contextlib.suppress(ValidationError):
                yield run, RunFacts.model_validate_json(text)
                continue
        facts = _read_facts(run)
        if folder_index.is_settled(folder, _FACT_FILES):
            text = facts.model_dump_json()
            new.setdefault(found.root, {})[found.name] = signature, text
        yield run, facts
    for root, texts in new.items():
        if len(texts) >= folder_index.MIN_RUNS or known[root]:
            folder_index.store(root, _FACTS, texts)


_FACT_FILES = ("recipe.json", "fingerprints.json")


def _read_facts(run: RunStatus) -> RunFacts:
    """Reads the facts of a run from its folder."""
    recipe, experiment = _recipe_and_experiment(run)
    baseline = recipe.baseline if recipe else None
    plan = run.plan
    parameters = plan.facts.parameters if plan else None
    return RunFacts(
        experiment=experiment,
        baseline=dict(baseline.metrics) if baseline else {},
        baseline_source=baseline.source if baseline else "",
        baseline_outcome=(baseline.outcome if baseline else None) or "",
        predicted_memory_bytes=plan.gpu_peak_bytes if plan else None,
        predicted_step_s=plan.time.step.total_s if plan and plan.time else None,
        total_parameters=parameters.total if parameters else None,
        trainable_parameters=parameters.trainable if parameters else None,
    )


def _recipe_and_experiment(run: RunStatus) -> tuple[FullRecipe | None, str]:
    """Returns the run's recipe, and a key that it shares with its repeats.

    The key is the run's identity without the seed. It does not hold the sweep: a sweep that was
    enlarged later is still one experiment.
    """
    try:
        recipe = read_record_if_exists(run.paths.recipe, FullRecipe)
        fingerprints = read_record_if_exists(run.paths.fingerprints, Fingerprints)
    except StoreError:
        return None, run.job.run_id
    if recipe is None or run.state != "COMPLETED":
        return recipe, run.job.run_id
    seedless = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": 0})})
    files = fingerprints.files if fingerprints else {}
    return recipe, f"experiment {compute_run_id(seedless, run.job.cluster, files)}"


def _new_row(run: RunStatus, facts: RunFacts) -> ResultRow:
    return ResultRow(
        recipe=run.job.recipe,
        point=dict(run.job.point),
        run_ids=[],
        state=run.state,
        note=run.note,
        **facts.model_dump(exclude={"schema_version", "experiment"}),
    )


def _add_record(row: ResultRow, record: RunRecord) -> None:
    row.split = record.split
    row.examples = record.examples
    for name, value in record.metrics.items():
        row.metrics.setdefault(name, []).append(value)
    for name, value in record.metrics_before.items():
        row.before.setdefault(name, []).append(value)
    for name, interval in record.intervals.items():
        row.intervals.setdefault(name, []).append(interval)
    if record.confusion:
        row.confusion.append(record.confusion.model_dump())
    row.notes += [note for note in record.notes if note not in row.notes]
    for package, version in record.versions.items():
        versions = row.versions.setdefault(package, [])
        versions += [version] if version not in versions else []
    if record.predicted_memory_bytes is not None:
        row.predicted_memory_bytes = record.predicted_memory_bytes
    if record.parameters:
        row.total_parameters = record.parameters.total
        row.trainable_parameters = record.parameters.trainable
    if record.predicted:
        row.predicted_step_s = record.predicted.step_s
    if record.measured:
        _add_measurement(row, record.measured)


def _add_measurement(row: ResultRow, measured: Measurement) -> None:
    row.wall_s.append(measured.wall_s)
    row.gpu_hours.append(measured.gpu_hours)
    row.peak_memory_bytes = max(row.peak_memory_bytes or 0, measured.rank_bytes)
    row.peak_host_bytes = max(row.peak_host_bytes or 0, measured.peak_host_bytes)
    for values, value in (
        (row.train_s, measured.train_s),
        (row.tokens_per_s, measured.tokens_per_s),
        (row.step_s, measured.step_s),
    ):
        values += [value] if value is not None else []
    for phase, phase_peaks in measured.phases.items():
        peaks = row.phases.setdefault(phase, {})
        for name, value in phase_peaks.model_dump(exclude_none=True).items():
            peaks[name] = max(value, peaks.get(name, 0))


def mean_std(values: list[float]) -> tuple[float, float | None]:
    """Returns the mean, and the sample standard deviation; None for a single value."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return statistics.fmean(values), std


def format_metric(values: list[float], intervals: Sequence[tuple[float, float]] = ()) -> str:
    """Formats a metric as `0.8421`, `0.8421 [0.8203, 0.8611]` or `0.8421 ± 0.0102 (n=3)`.

    Args:
        values: its value in each run.
        intervals: its interval in each run; shown for a single run.
    """
    mean, std = mean_std(values)
    if std is not None:
        return f"{mean:.4f} ± {std:.4f} (n={len(values)})"
    ends = "".join(f" [{low:.4f}, {high:.4f}]" for low, high in intervals)
    return f"{mean:.4f}{ends}"


def row_as_json(row: ResultRow) -> dict[str, Any]:
    """Returns a row as JSON values: each metric with mean, spread, values and intervals."""

    def summary(metrics: dict[str, list[float]]) -> dict[str, Any]:
        return {
            name: {"mean": mean_std(v)[0], "stdev": mean_std(v)[1], "values": v}
            for name, v in metrics.items()
        }

    shown = {**vars(row), "metrics": summary(row.metrics), "before": summary(row.before)}
    for name, intervals in shown.pop("intervals").items():
        shown["metrics"][name]["intervals"] = intervals
    return shown
