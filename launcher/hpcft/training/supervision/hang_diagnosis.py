"""Diagnoses a hang: which rank all others wait for, from what each rank reports of itself.

A rank that waits for others is as quiet as the one that they wait for, but its stack shows it. All
ranks also go through the same phases and steps: if the stacks show nothing (on a GPU, ranks run
ahead of their collectives), the rank that is behind is found by counting.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from hpcft.core.errors import StoreError
from hpcft.core.files import read_record
from hpcft.core.records import RankError, StoredRecord
from hpcft.core.records.base import renamed_from

# Innermost frames of a rank that waits for others: in `rendezvous._wait_for`, in a collective, in
# DDP's exchange of buffers before a forward pass, or in autograd, which runs DDP's collectives.
_WAITS = re.compile(
    r"in (_wait_for|_sync_buffers|_engine_run_backward)$|torch/distributed/|deepspeed/comm/", re.M
)
_MAX_FRAMES = 12
# Node of a rank that reports nothing.
UNKNOWN_NODE = "unknown"


class StackRequest(StoredRecord):
    """Request to all ranks to report what they are doing, because one is quiet or stopped."""

    rank: int
    """Global rank whose supervisor requests it."""
    at: float
    """Unix time in seconds."""


class StackReport(StoredRecord):
    """Report of a rank on what its worker is doing."""

    rank: int
    """Global rank."""
    node: str
    """Node that it runs on."""
    phase: str
    """Phase of its last heartbeat."""
    step: int
    """Steps, or examples, that it has done."""
    phases: int
    """Number of phases that it has gone through."""
    heartbeats: int = Field(validation_alias=renamed_from("beats", "heartbeats"))
    """Number of heartbeats in its current phase."""
    quiet_s: float
    """Seconds since its last heartbeat."""
    limit_s: float
    """Seconds after which it is quiet for too long."""
    step_s: float | None
    """Median seconds of its steps; None before the first."""
    stopped: bool
    """Whether a signal (SIGSTOP) has stopped its process."""
    waits: bool
    """Whether its stack shows that it waits for other ranks."""

    @property
    def makes_progress(self) -> bool:
        """Whether it sent a heartbeat recently."""
        return not self.stopped and self.phase != "done" and self.quiet_s < self.limit_s / 2

    @property
    def description(self) -> str:
        """Its state in words."""
        quiet = f"no heartbeat for {self.quiet_s:.0f} s ({self.phase})"
        if self.phase == "training":
            took = f" (steps took {self.step_s:.1f} s)" if self.step_s else ""
            quiet = f"no step for {self.quiet_s:.0f} s after step {self.step}{took}"
        return f"is stopped (SIGSTOP), {quiet}" if self.stopped else quiet

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.node}: {self.description}"


def waits_for_others(stacks: str) -> bool:
    """Returns whether the main thread is in a collective; faulthandler writes it last."""
    main_thread = stacks.rpartition("(most recent call first):")[2]
    frames = main_thread.strip().splitlines()[:_MAX_FRAMES]
    return _WAITS.search("\n".join(frames)) is not None


def read_reports(folder: Path) -> list[StackReport]:
    """Reads the reports that ranks have written so far, by rank; skips files that are damaged."""
    reports = []
    for file in folder.glob("[0-9]*.json"):
        try:
            reports.append(read_record(file, StackReport))
        except StoreError:
            continue
    return sorted(reports, key=lambda report: report.rank)


def find_late_ranks(reports: Sequence[StackReport]) -> list[StackReport]:
    """Returns the ranks that the others wait for; all ranks if nothing tells them apart."""
    stopped = [report for report in reports if report.stopped]
    if stopped:
        return stopped
    suspects = [report for report in reports if not report.waits] or reports
    return _with_fewest(_with_fewest(suspects, "phases"), "heartbeats")


def _with_fewest(reports: Sequence[StackReport], field: str) -> list[StackReport]:
    fewest = min(getattr(report, field) for report in reports)
    return [report for report in reports if getattr(report, field) == fewest]


def diagnose_hang(
    folder: Path, reports: Sequence[StackReport], ranks: int, job_id: str
) -> RankError | None:
    """Returns the error of the rank that hangs; None while any rank makes progress.

    Args:
        folder: folder of the reports, which the error's advice names.
        reports: reports of the ranks; a rank without one is the suspect.
        ranks: number of ranks.
        job_id: job of the ranks.
    """
    if any(r.makes_progress for r in reports) and not any(r.stopped for r in reports):
        return None
    silent = sorted(set(range(ranks)) - {report.rank for report in reports})
    late = find_late_ranks(reports)
    first = late[0]
    message = first.description
    rank, node = first.rank, first.node
    # While others train, a rank without a report cannot have finished and ended.
    if silent and not first.stopped and (first.waits or first.phase == "training"):
        rank, node = silent[0], UNKNOWN_NODE
        also = f" (nor do those of ranks {_list_ranks(silent[1:])})" if len(silent) > 1 else ""
        message = f"its supervisor does not respond{also}; {first}"
    elif len(late) == ranks > 1:
        message += "; the same on all ranks"
    elif len(late) > 1:
        message += f"; the same on ranks {_list_ranks([r.rank for r in late])} of {ranks}"
    return RankError.now(
        rank,
        "Hang",
        message,
        node=node,
        job_id=job_id,
        phase=first.phase,
        failure="stuck",
        next_step=f"see what each rank was doing in {folder}",
    )


def _list_ranks(ranks: Sequence[int], limit: int = 16) -> str:
    more = f" and {len(ranks) - limit} more" if len(ranks) > limit else ""
    return ", ".join(map(str, ranks[:limit])) + more
