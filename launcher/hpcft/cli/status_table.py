"""The status table: one row per run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hpcft.config.sweep import format_point
from hpcft.core.units import format_bytes, format_seconds
from hpcft.jobs.status import RunStatus
from hpcft.recovery.log import describe_fallbacks


@dataclass(frozen=True)
class Column:
    """A column of `hpcft status`."""

    title: str
    cell: Callable[[RunStatus], str]
    right: bool = False


def _step(view: RunStatus) -> str:
    p = view.progress
    if p is None or view.record is not None:
        return ""
    return f"{p.step}/{p.total_steps}" if p.total_steps else p.phase


def _bar(view: RunStatus) -> str:
    share = done_share(view)
    if share is None:
        return ""
    filled = round(share * 10)
    return "█" * filled + "░" * (10 - filled) + f" {share:4.0%}"


def done_share(view: RunStatus) -> float | None:
    """Share of the optimizer steps that are done, from 0 to 1."""
    if view.record is not None:
        return 1.0
    p = view.progress
    return min(max(p.step / p.total_steps, 0.0), 1.0) if p and p.total_steps else None


def _of_progress(name: str, shown: Callable[[Any], str]) -> Callable[[RunStatus], str]:
    def cell(view: RunStatus) -> str:
        value = getattr(view.progress, name, None) if view.progress else None
        return "" if value is None else shown(value)

    return cell


def _memory(view: RunStatus) -> str:
    p = view.progress
    if p is None or p.memory_bytes is None:
        return ""
    return f"{format_bytes(p.memory_bytes)} ({format_bytes(p.peak_memory_bytes)})"


def _note(view: RunStatus) -> str:
    if not view.fallbacks or view.state == "FAILED":  # why it failed tells its rungs
        return view.note
    came_down = f"was out of memory, went on with {describe_fallbacks(view.fallbacks)}"
    return f"{view.note}; {came_down}" if view.note else came_down


COLUMNS = (
    Column("run", lambda v: f"{v.job.recipe}/{v.job.run_id}"),
    Column("point", lambda v: format_point(v.job.point)),
    Column("cluster", lambda v: v.job.cluster),
    Column("job", lambda v: v.job_id),
    Column("state", lambda v: v.state),
    Column("nodes", lambda v: v.nodes),
    Column("elapsed", lambda v: format_seconds(v.elapsed_s), right=True),
    Column("progress", _bar),
    Column("step", _step, right=True),
    Column("loss", _of_progress("loss", lambda x: f"{x:.4f}"), right=True),
    Column("tokens/s", _of_progress("tokens_per_s", lambda x: f"{x:,.0f}"), right=True),
    Column("memory (peak)", _memory, right=True),
    Column("ETA", lambda v: format_seconds(v.progress.eta_s) if v.is_live and v.progress else "",
           right=True),
    Column("note", _note),
)  # fmt: skip
