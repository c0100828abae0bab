"""Adds up the allocator's events of a profile: peaks by phase, and live blocks at the peak."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

MARK = "hpcft: "
"""Prefix of the names of the events that begin phases."""


@dataclass(frozen=True)
class Block:
    """Memory that the allocator allocates or, with a negative size, frees."""

    at_ns: int
    """Time of the event in nanoseconds."""
    address: int
    """Address of the block."""
    size: int
    """Bytes; negative when the block is freed."""
    made_in: str
    """Operation that allocated the block, with its callers, outermost first."""


@dataclass(frozen=True)
class Operation:
    """One operation of the profile, with start and end in nanoseconds."""

    start_ns: int
    end_ns: int
    name: str
    depth: int


def read(profiler: Any) -> tuple[list[Block], list[Operation]]:
    """Returns the blocks and operations of a stopped `torch.profiler.profile`, ordered by time."""
    import torch

    allocation = torch._C._profiler._EventType.Allocation
    blocks: list[Block] = []
    operations: list[Operation] = []
    roots = profiler.profiler.kineto_results.experimental_event_tree()
    stack: list[tuple[Any, tuple[str, ...]]] = [(root, ()) for root in roots]
    while stack:
        event, path = stack.pop()
        if event.tag == allocation:
            fields = event.extra_fields
            blocks.append(
                Block(event.start_time_ns, fields.ptr, fields.alloc_size, " > ".join(path[-3:]))
            )
        else:
            operations.append(
                Operation(event.start_time_ns, event.end_time_ns, event.name, len(path))
            )
        stack += [(inner, (*path, event.name)) for inner in event.children]
    blocks.sort(key=lambda block: block.at_ns)
    operations.sort(key=lambda operation: operation.start_ns)
    return blocks, operations


@dataclass
class Account:
    """Live memory during a profile."""

    phases: list[tuple[str, int, int]]
    """Name of each phase, its peak bytes, and the live bytes at its end."""
    peak_bytes: int
    """Peak of the phases that count."""
    peak_at_ns: int
    """Time of the peak in nanoseconds."""
    live: list[Block]
    """Live blocks at the peak."""
    unseen_frees: int
    """Number of blocks whose address was allocated again although no free was recorded."""


def account(blocks: list[Block], operations: list[Operation], counts: str) -> Account:
    """Adds up the blocks; only phases whose name begins with `counts` can have the peak."""
    starts = [("loading", 0)] + [
        (o.name.removeprefix(MARK), o.start_ns) for o in operations if o.name.startswith(MARK)
    ]
    ends = [at for _, at in starts[1:]] + [2**63]
    live: dict[int, Block] = {}
    total = unseen = index = 0
    result = Account([], 0, 0, [], 0)
    for (name, _), end in zip(starts, ends, strict=True):
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
            if name.startswith(counts) and total > result.peak_bytes:
                result.peak_bytes, result.peak_at_ns = total, block.at_ns
        result.phases.append((name, peak, total))
    result.unseen_frees = unseen
    result.live = _live_at(blocks, result.peak_at_ns)
    return result


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
    """Returns live blocks grouped by size and operation, the largest groups first."""
    counted = Counter((block.size, block.made_in) for block in live)
    rows = [
        {"bytes": size * count, "count": count, "size": size, "made_in": made_in}
        for (size, made_in), count in counted.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"])


def around(operations: list[Operation], at_ns: int, limit: int) -> list[str]:
    """Returns the operations around a moment, as text.

    Args:
        operations: operations of the profile.
        at_ns: time of the moment in nanoseconds.
        limit: number of outer operations before and after it.
    """
    enclosing = [o for o in operations if o.start_ns <= at_ns <= o.end_ns]
    outer = [o for o in operations if o.depth <= 2]
    before = [o.name for o in outer if o.end_ns < at_ns][-limit:]
    after = [o.name for o in outer if o.start_ns > at_ns][:limit]
    inside = " > ".join(o.name for o in enclosing)
    return [*(f"before: {name}" for name in before), f"AT PEAK: {inside}",
            *(f"after: {name}" for name in after)]  # fmt: skip
