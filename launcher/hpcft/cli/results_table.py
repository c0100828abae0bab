"""The results table: metrics with intervals, published results, memory and time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from hpcft.config.sweep import format_point
from hpcft.core.errors import UsageError
from hpcft.core.units import format_bytes, format_count, format_number, format_seconds
from hpcft.jobs.results import ResultRow, format_metric
from hpcft.metrics import direction_arrow

HEADLINE = ("accuracy", "no_answer", "majority", "exact", "f1", "perplexity", "completion_loss")
"""Metrics that are shown by default, in this order; `--metric` and `--json` show others."""

Column = tuple[str, Callable[[ResultRow], str]]


def with_arrows(header: list[str]) -> list[str]:
    """Returns the header with an arrow at each metric: higher (`↑`) or lower (`↓`) is better."""
    return [f"{title} {direction_arrow(title)}".rstrip() for title in header]


def table(
    rows: Sequence[ResultRow], metrics: list[str] | None = None
) -> tuple[list[str], list[list[str]]]:
    """Returns the header and cells of the results table, without empty columns.

    Args:
        rows: rows of results.
        metrics: names of the metrics to show; None for the headline ones.

    Raises:
        UsageError: no row has one of the metrics.
    """
    columns = [*_RUN_COLUMNS]
    for name in _shown_metrics(rows, metrics):
        columns += _metric_columns(name)
    columns += _COST_COLUMNS
    texts = [[cell(row) for row in rows] for _, cell in columns]
    used = [i for i, column in enumerate(texts) if any(column) or i == 0]
    header = [columns[i][0] for i in used]
    return header, [[texts[i][j] for i in used] for j in range(len(rows))]


def _shown_metrics(rows: Sequence[ResultRow], requested: list[str] | None) -> list[str]:
    present = {name for row in rows for name in (*row.metrics, *row.baseline)}
    if absent := [name for name in requested or () if name not in present]:
        known = ", ".join(sorted(present)) or "none"
        raise UsageError(f"no run has the metric {', '.join(absent)}; there are: {known}")
    return requested or [name for name in HEADLINE if name in present] or sorted(present)[:4]


def _metric_columns(name: str) -> list[Column]:
    """Returns the columns of a metric: after training, before it, and as others reported it."""

    def after(row: ResultRow) -> str:
        values = row.metrics.get(name)
        return format_metric(values, row.intervals.get(name, ())) if values else ""

    def before(row: ResultRow) -> str:
        values = row.before.get(name)
        return format_metric(values) if values else ""

    def reported(row: ResultRow) -> str:
        return f"{row.baseline[name]:.4f}" if name in row.baseline else ""

    return [(name, after), (f"{name} before", before), (f"{name} reported", reported)]


def _seconds(duration_s: float | None) -> str:
    return "" if duration_s is None else f"{format_number(duration_s)} s"


def _mean_time(durations_s: list[float]) -> str:
    return format_seconds(statistics.fmean(durations_s)) if durations_s else ""


_RUN_COLUMNS: tuple[Column, ...] = (
    ("recipe", lambda row: row.recipe),
    ("point", lambda row: format_point({**row.point, **row.changes})),
    ("state", lambda row: row.state),
    ("split", lambda row: row.split),
    ("examples", lambda row: f"{row.examples[row.split]:,}" if row.split in row.examples else ""),
)
_COST_COLUMNS: tuple[Column, ...] = (
    ("reported outcome", lambda row: row.baseline_outcome),
    ("parameters", lambda row: format_count(row.total_parameters)),
    ("trainable", lambda row: format_count(row.trainable_parameters)),
    ("time", lambda row: _mean_time(row.wall_s)),
    ("of it training", lambda row: _mean_time(row.train_s)),
    ("GPU hours", lambda row: f"{sum(row.gpu_hours):.4f}" if row.gpu_hours else ""),
    ("memory predicted", lambda row: format_bytes(row.predicted_memory_bytes)),
    ("memory measured", lambda row: format_bytes(row.peak_memory_bytes)),
    ("step predicted", lambda row: _seconds(row.predicted_step_s) if row.step_s else ""),
    ("step measured", lambda row: _seconds(statistics.median(row.step_s)) if row.step_s else ""),
    ("fallbacks", lambda row: ", ".join(row.fallbacks)),
    ("source", lambda row: row.baseline_source),
    ("note", lambda row: row.note or "; ".join(row.notes)),
)
