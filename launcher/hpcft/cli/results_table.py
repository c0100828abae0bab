"""The results table: metrics with intervals, the baseline, memory and time."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from hpcft.config.sweep import format_point
from hpcft.core.errors import UsageError
from hpcft.core.units import format_bytes, format_count, format_number, format_seconds
from hpcft.jobs.results import ResultRow, format_metric
from hpcft.metrics.facts import arrow

# Shown first, in this order, if a run has them; the rest only in JSON and CSV, or on request.
HEADLINE = ("accuracy", "no_answer", "majority", "exact", "f1", "perplexity", "completion_loss")


def with_arrows(header: list[str]) -> list[str]:
    """The header for people: after a metric, whether higher (`↑`) or lower (`↓`) is better."""
    return [f"{title} {arrow(title)}".rstrip() for title in header]


def table(
    found: list[ResultRow], metrics: list[str] | None = None
) -> tuple[list[str], list[list[str]]]:
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
        [row.recipe, format_point(row.point),
         row.state, row.split]
        for row in found
    ]  # fmt: skip
    for name in names:
        columns = [
            (name, [format_metric(row.metrics[name], row.intervals.get(name, ()))
                    if name in row.metrics else "" for row in found]),
            (f"{name} before",
             [format_metric(row.before[name]) if name in row.before else "" for row in found]),
            (f"{name} reported",
             [f"{row.baseline[name]:.4f}" if name in row.baseline else "" for row in found]),
        ]  # fmt: skip
        for title, cells in columns:
            header.append(title)
            for line, cell in zip(body, cells, strict=True):
                line.append(cell)
    rest: dict[str, Callable[[ResultRow], str]] = {
        "reported outcome": lambda r: r.baseline_outcome,
        "parameters": lambda r: format_count(r.total_parameters),
        "trainable": lambda r: format_count(r.trainable_parameters),
        "time": lambda r: format_seconds(sum(r.wall_s) / len(r.wall_s)) if r.wall_s else "",
        "GPU hours": lambda r: f"{sum(r.gpu_hours):.4f}" if r.gpu_hours else "",
        "memory predicted": lambda r: format_bytes(r.predicted_memory_bytes),
        "memory measured": lambda r: format_bytes(r.peak_memory_bytes),
        "step predicted": lambda r: _seconds(r.predicted_step_s) if r.step_s else "",
        "step measured": lambda r: _seconds(statistics.median(r.step_s)) if r.step_s else "",
        "rungs": lambda r: ", ".join(r.fallbacks),
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
