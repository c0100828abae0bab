"""What ranks say of themselves when a run seems stuck, and which of them the others wait for.

A rank that waits for others is as quiet as the one that it waits for, but its stack tells. And all
ranks go through the same phases and the same steps: of those whose stacks tell nothing (on a GPU
they run ahead of their collectives), the one that is behind is found by counting.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from hpcft.core.errors import StoreError
from hpcft.core.files import read_record
from hpcft.core.records import StoredRecord
from hpcft.recovery.diagnosis import RankError

# Innermost frames of a rank that waits for the others: at the meeting, in a collective, where DDP
# sends buffers before a forward pass, or in autograd, which runs DDP's collectives.
_WAITS = re.compile(
    r"in (_wait_for|_sync_buffers|_engine_run_backward)$|torch/distributed/|deepspeed/comm/", re.M
)
_FRAMES = 12
# Of a rank that does not say where it is.
UNKNOWN = "unknown"


class StackRequest(StoredRecord):
    """A rank was quiet for too long, or is stopped: all are to say what they do."""

    rank: int
    """Global rank whose supervisor asks."""
    at: float
    """Unix time in seconds."""


class StackReport(StoredRecord):
    """What a rank was doing when it was asked."""

    rank: int
    """Global rank."""
    node: str
    """Node that it runs on."""
    phase: str
    """Phase of its last beat."""
    step: int
    """Steps, or examples, that it had done."""
    phases: int
    """Phases that it had gone through."""
    beats: int
    """Beats in the last of them."""
    quiet_s: float
    """Seconds since the last beat."""
    limit_s: float
    """Seconds after which that is too long."""
    step_s: float | None
    """Median time of its steps; None before the first."""
    stopped: bool
    """Whether a signal (SIGSTOP) has stopped the process."""
    waits: bool
    """Whether its stack says that it waits for other ranks."""

    @property
    def moves(self) -> bool:
        """Whether it has come further a while ago."""
        return not self.stopped and self.phase != "done" and self.quiet_s < self.limit_s / 2

    @property
    def words(self) -> str:
        """What is seen of it."""
        quiet = f"no sign of life for {self.quiet_s:.0f} s ({self.phase})"
        if self.phase == "training":
            took = f" (steps took {self.step_s:.1f} s)" if self.step_s else ""
            quiet = f"no step for {self.quiet_s:.0f} s after step {self.step}{took}"
        return f"is stopped (SIGSTOP), {quiet}" if self.stopped else quiet

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.node}: {self.words}"


def waits_for_others(stacks: str) -> bool:
    """Whether the main thread, the last one in what faulthandler wrote, is in a collective."""
    main = stacks.rpartition("(most recent call first):")[2]
    return _WAITS.search("\n".join(main.strip().splitlines()[:_FRAMES])) is not None


def answers(folder: Path) -> list[StackReport]:
    """What was answered so far, by rank."""
    found = []
    for file in folder.glob("[0-9]*.json"):
        try:
            found.append(read_record(file, StackReport))
        except StoreError:
            continue
    return sorted(found, key=lambda answer: answer.rank)


def late(answered: Sequence[StackReport]) -> list[StackReport]:
    """The ranks that the others wait for; all where nothing tells them apart."""
    stopped = [answer for answer in answered if answer.stopped]
    if stopped:
        return stopped
    suspects = [answer for answer in answered if not answer.waits] or answered
    return _fewest(_fewest(suspects, "phases"), "beats")


def _fewest(answered: Sequence[StackReport], field: str) -> list[StackReport]:
    least = min(getattr(answer, field) for answer in answered)
    return [answer for answer in answered if getattr(answer, field) == least]


def judge(
    folder: Path, answered: Sequence[StackReport], ranks: int, job_id: str
) -> RankError | None:
    """Why the run is stuck; None where a rank comes further and the others only wait for it.

    Args:
        folder: where the answers are, for people.
        answered: what ranks have answered; one that has not is the suspect.
        ranks: how many there are.
        job_id: attempt that they belong to.
    """
    if any(a.moves for a in answered) and not any(a.stopped for a in answered):
        return None
    silent = sorted(set(range(ranks)) - {answer.rank for answer in answered})
    culprits = late(answered)
    first = culprits[0]
    said = first.words
    rank, node = first.rank, first.node
    # While training none is done yet, and gone.
    if silent and not first.stopped and (first.waits or first.phase == "training"):
        rank, node = silent[0], UNKNOWN
        also = f"; so ranks {_listed(silent)}" if len(silent) > 1 else ""
        said = f"its supervisor does not answer{also}; {first}"
    elif len(culprits) == ranks > 1:
        said += "; so all ranks"
    elif len(culprits) > 1:
        said += f"; so ranks {_listed([answer.rank for answer in culprits])} of {ranks}"
    return RankError.now(
        rank,
        "Stuck",
        said,
        node=node,
        job_id=job_id,
        phase=first.phase,
        failure="stuck",
        next_step=f"see what each rank was doing in {folder}",
    )


def _listed(ranks: Sequence[int], most: int = 16) -> str:
    more = f" and {len(ranks) - most} more" if len(ranks) > most else ""
    return ", ".join(map(str, ranks[:most])) + more
