"""Collectives between ranks on the CPU (gloo), so that no GPU has to wait for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed


class RankConsensus:
    """Lets the ranks of a run agree on flags and numbers; works for a single rank too."""

    def __init__(self) -> None:
        """Creates a gloo group; all ranks have to call it, after the process group is set up."""
        self.is_distributed = distributed.is_initialized() and distributed.get_world_size() > 1
        self.group: Any = None
        if self.is_distributed and distributed.get_backend() != "gloo":
            self.group = distributed.new_group(backend="gloo")

    def any(self, *flags: bool) -> list[bool]:
        """Returns, per flag, whether it is set on any rank (all ranks get the same list)."""
        if not self.is_distributed:
            return list(flags)
        votes = torch.tensor(flags, dtype=torch.uint8)
        distributed.all_reduce(votes, op=distributed.ReduceOp.MAX, group=self.group)
        return [bool(vote) for vote in votes.tolist()]

    def barrier(self) -> None:
        """Waits until every rank has called it."""
        self.any(True)

    def gather(self, number: float) -> list[float]:
        """Returns the numbers of all ranks, by rank (all ranks get the same list)."""
        if not self.is_distributed:
            return [number]
        size = distributed.get_world_size()
        numbers = [torch.zeros(1, dtype=torch.float64) for _ in range(size)]
        own = torch.tensor([number], dtype=torch.float64)
        distributed.all_gather(numbers, own, group=self.group)
        return [float(number) for number in numbers]

    def gather_objects(self, value: Any) -> list[Any]:
        """Returns the values of all ranks, by rank; values have to be picklable."""
        if not self.is_distributed:
            return [value]
        values: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(values, value, group=self.group)
        return values


def gather_objects(value: Any) -> list[Any]:
    """Returns the values of all ranks, by rank; values have to be picklable."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
