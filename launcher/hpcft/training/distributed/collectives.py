"""How ranks agree at the end of a step: over processors alone, so that no GPU waits for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed


class RankConsensus:
    """The ranks of a run, or one rank alone."""

    def __init__(self) -> None:
        """Made by all ranks at once, after they have joined."""
        self.together = distributed.is_initialized() and distributed.get_world_size() > 1
        self.group: Any = None
        if self.together and distributed.get_backend() != "gloo":
            self.group = distributed.new_group(backend="gloo")

    def any(self, *mine: bool) -> list[bool]:
        """Of each question whether it is so on any rank; the same answers on all."""
        if not self.together:
            return list(mine)
        votes = torch.tensor(mine, dtype=torch.uint8)
        distributed.all_reduce(votes, op=distributed.ReduceOp.MAX, group=self.group)
        return [bool(vote) for vote in votes.tolist()]

    def wait(self) -> None:
        """Returns when every rank has come here."""
        self.any(True)

    def all(self, mine: float) -> list[float]:
        """The number of each rank, on every rank."""
        if not self.together:
            return [mine]
        found = [torch.zeros(1, dtype=torch.float64) for _ in range(distributed.get_world_size())]
        own = torch.tensor([mine], dtype=torch.float64)
        distributed.all_gather(found, own, group=self.group)
        return [float(number) for number in found]


def gather_objects(value: Any) -> list[Any]:
    """The value of every rank, on every rank."""
    if not torch.distributed.is_initialized():
        return [value]
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, value)
    return every
