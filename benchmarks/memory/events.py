"""The allocator's events of a profile, added up: peaks by phase, and what lived at the peak."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

MARK = "hpcft: "
"""Begins the names of the events that bound phases."""


@dataclass(frozen=True)
class Block:
    """Memory taken (or, with a negative size, given back) by the allocator."""

    at_ns: int
    address: int
    size: int
    made_in: str
    """The operation, and what called it, outermost first."""


@dataclass(frozen=True)
class Operation:
    """An operation of the profile."""

    start_ns: int
    end_ns: int
    name: str
    depth: int


def read(profiler: Any) -> tuple[list[Block], list[Operation]]:
    """Blocks and operations of a stopped `torch.profiler.profile`, in the order of time."""
    import torch

    allocation = torch._C._profiler._EventType.Allocation
    blocks: list[Block] = []
    operations: list[Operation] = []
    roots = profiler.profiler.kineto_results.experimental_event_tree()
    waiting: list[tuple[Any, tuple[str, ...]]] = [(root, ()) for root in roots]
    while waiting:
        event, path = waiting.pop()
        if event.tag == allocation:
            fields = event.extra_fields
            blocks.append(
                Block(event.start_time_ns, fields.ptr, fields.alloc_size, " > ".join(path[-3:]))
            )
        else:
            operations.append(
                Operation(event.start_time_ns, event.end_time_ns, event.name, len(path))
            )
        waiting += [(child, (*path, event.name)) for child in event.children]
    blocks.sort(key=lambda block: block.at_ns)
    operations.sort(key=lambda operation: operation.start_ns)
    return blocks, operations


@dataclass
class Account:
    """Live memory over the course of a profile."""

    marks: list[tuple[str, int, int]]
    """Each phase: its name, its peak, and what lives at its end."""
    peak_bytes: int
    """The most that lived at once in the phases that count."""
    peak_at_ns: int
    """When."""
    live: list[Block]
    """What lived then."""
    unseen_frees: int
    """Blocks whose address was taken again without being seen given back."""


def account(blocks: list[Block], operations: list[Operation], counts: str) -> Account:
    """Adds up the blocks; only phases whose name begins with `counts` can hold the peak."""
    marks = [("loading", 0)] + [
        (o.name.removeprefix(MARK), o.start_ns) for o in operations if o.name.startswith(MARK)
    ]
    phases = list(zip(marks, [at for _, at in marks[1:]] + [2**63], strict=True))
    live: dict[int, Block] = {}
    total = unseen = index = 0
    found: list[tuple[str, int, int]] = []
    best = Account(found, 0, 0, [], 0)
    for (name, _), end in phases:
        peak = total
        while index < len(blocks) and blocks[index].at_ns < end:
            block = blocks[index]
            index += 1
            before = live.pop(block.address, None)
            if block.size > 0:
                live[block.address] = block
                total += block.size
            if before is not None:
                total -= before.size
                unseen += block.size > 0
            peak = max(peak, total)
            if name.startswith(counts) and total > best.peak_bytes:
                best.peak_bytes, best.peak_at_ns = total, block.at_ns
        found.append((name, peak, total))
    best.unseen_frees = unseen
    best.live = _live_at(blocks, best.peak_at_ns)
    return best


def _live_at(blocks: list[Block], at_ns: int) -> list[Block]:
    live: dict[int, Block] = {}
    for block in blocks:
        if block.at_ns > at_ns:
            break
        live.pop(block.address, None)
        if block.size > 0:
            live[block.address] = block
    return list(live.values())


def groups(live: list[Block]) -> list[dict[str, Any]]:
    """Live blocks of the same size made in the same place, the largest groups first."""
    counted = Counter((block.size, block.made_in) for block in live)
    rows = [
        {"bytes": size * count, "count": count, "size": size, "made_in": made_in}
        for (size, made_in), count in counted.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"])


def around(operations: list[Operation], at_ns: int, most: int) -> list[str]:
    """The operations that enclose a moment, and the nearest outermost ones before and after it."""
    enclosing = [o for o in operations if o.start_ns <= at_ns <= o.end_ns]
    outer = [o for o in operations if o.depth <= 2]
    before = [o.name for o in outer if o.end_ns < at_ns][-most:]
    after = [o.name for o in outer if o.start_ns > at_ns][:most]
    inside = " > ".join(o.name for o in enclosing)
    return [*(f"before: {name}" for name in before), f"AT PEAK: {inside}",
            *(f"after: {name}" for name in after)]  # fmt: skip
