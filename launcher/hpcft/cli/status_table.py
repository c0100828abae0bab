"""The table of `hpcft status`: one row per run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from hpcft.config.sweep import format_point
from hpcft.core.records import Progress
from hpcft.core.units import format_bytes, format_seconds
from hpcft.jobs.status import RunStatus
from hpcft.recovery.log import describe_fallbacks

T = TypeVar("T")


@dataclass(frozen=True)
class Column:
    """A column of the status table."""

    title: str
    """Title in the header."""
    cell: Callable[[RunStatus], str]
    """Function that returns the text of a run's cell; empty if there is nothing to show."""
    is_right_aligned: bool = False
    """Whether the texts are aligned to the right."""


def table(runs: Sequence[RunStatus]) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the cells of the status table."""
    header = [column.title for column in COLUMNS]
    return header, [[column.cell(run) for column in COLUMNS] for run in runs]


def done_share(run: RunStatus) -> float | None:
    """Returns the share of the optimizer steps that are done, from 0 to 1; None if not known."""
    if run.is_completed:
        return 1.0
    progress = run.progress
    if progress is None or not progress.total_steps:
        return None
    return min(max(progress.step / progress.total_steps, 0.0), 1.0)


def _bar(run: RunStatus) -> str:
    share = done_share(run)
    if share is None:
        return ""
    filled = round(share * 10)
    return "█" * filled + "░" * (10 - filled) + f" {share:4.0%}"


def _step(run: RunStatus) -> str:
    progress = run.progress
    if progress is None or run.is_completed:
        return ""
    return f"{progress.step}/{progress.total_steps}" if progress.total_steps else progress.phase


def _from_progress(
    value: Callable[[Progress], T | None], as_text: Callable[[T], str]
) -> Callable[[RunStatus], str]:
    """Returns a cell that shows a value of the heartbeat, and is empty without one."""

    def cell(run: RunStatus) -> str:
        shown = value(run.progress) if run.progress else None
        return "" if shown is None else as_text(shown)

    return cell


def _memory(run: RunStatus) -> str:
    progress = run.progress
    if progress is None or progress.memory_bytes is None:
        return ""
    return f"{format_bytes(progress.memory_bytes)} ({format_bytes(progress.peak_memory_bytes)})"


def _note(run: RunStatus) -> str:
    if not run.fallbacks or run.state == "FAILED":  # The reason of the failure names fallbacks.
        return run.note
    fell_back = f"ran out of memory, fell back to {describe_fallbacks(run.fallbacks)}"
    return f"{run.note}; {fell_back}" if run.note else fell_back


COLUMNS = (
    Column("run", lambda run: f"{run.job.recipe}/{run.job.run_id}"),
    Column("point", lambda run: format_point(run.job.point)),
    Column("cluster", lambda run: run.job.cluster),
    Column("job", lambda run: run.job_id),
    Column("state", lambda run: run.state),
    Column("nodes", lambda run: run.nodes),
    Column("elapsed", lambda run: format_seconds(run.elapsed_s), is_right_aligned=True),
    Column("progress", _bar),
    Column("step", _step, is_right_aligned=True),
    Column("loss", _from_progress(lambda p: p.loss, "{:.4f}".format), is_right_aligned=True),
    Column("tokens/s", _from_progress(lambda p: p.tokens_per_s, "{:,.0f}".format),
           is_right_aligned=True),
    Column("memory (peak)", _memory, is_right_aligned=True),
    Column("ETA",
           lambda run: format_seconds(run.progress.eta_s) if run.is_live and run.progress else "",
           is_right_aligned=True),
    Column("note", _note),
)  # fmt: skip
RIGHT_ALIGNED = {column.title for column in COLUMNS if column.is_right_aligned}
DROPPED_FIRST = (
    "nodes", "cluster", "job", "memory (peak)", "elapsed", "tokens/s", "point", "step", "note",
)  # fmt: skip
"""Titles of the columns that a narrow terminal does without, the least important first."""
