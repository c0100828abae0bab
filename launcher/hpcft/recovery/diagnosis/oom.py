"""Finds out of an error whether memory ran out, and whether this run or another process held it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hpcft.core.units import GIB, KIB, MIB, format_bytes

EVIDENCE_CHARS = 300
# Size of a CUDA context, which PyTorch does not count. It is assumed if no message lists it.
CONTEXT_BYTES = GIB

# `Cannot allocate memory` is the text of ENOMEM; C++ throws `std::bad_alloc`.
_TEXT = re.compile(
    r"out of memory|CUBLAS_STATUS_ALLOC_FAILED|an't allocate memory|annot allocate memory"
    r"|std::bad_alloc",
    re.IGNORECASE,
)
_SIZE = r"([\d.]+) (bytes|KiB|MiB|GiB)"
_UNITS = {"bytes": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB}


@dataclass(frozen=True)
class GpuMemoryUsage:
    """Memory of a GPU, by holder, at the moment when it ran out; in bytes."""

    total: int
    """Memory of the GPU."""
    free: int
    """Memory that no process held."""
    own: int
    """Memory that this process held."""
    wanted: int = 0
    """Size of the allocation that failed."""
    others: tuple[tuple[str, int], ...] = ()
    """Name and memory of each other process."""
    unused: int = 0
    """Memory that PyTorch had reserved, in pieces that it could not use."""

    @property
    def others_bytes(self) -> int:
        """Memory that all other processes held."""
        return sum(size for _, size in self.others)


@dataclass(frozen=True)
class OutOfMemory:
    """An error that means that memory ran out."""

    evidence: str
    """Line of the error that says so."""
    of_host: bool = False
    """Whether the node's memory ran out, not a GPU's."""
    foreign: str = ""
    """Sentence that names the other processes that held the memory; empty if this run held it."""
    fragmented: bool = False
    """Whether the allocation would have fitted into the pieces that PyTorch held unused."""


def parse_out_of_memory(
    error: BaseException, planned_bytes: int | None = None, measured: GpuMemoryUsage | None = None
) -> OutOfMemory | None:
    """Reads an exception; returns None if it does not mean that memory ran out.

    Args:
        error: exception of a rank, on a GPU or on a CPU.
        planned_bytes: memory that the plan predicts for this process; None without a prediction.
        measured: usage that the device reports, for errors whose text names no sizes.
    """
    text = f"{type(error).__name__}: {error}"
    match = _TEXT.search(text)
    if match is None and not isinstance(error, MemoryError):
        return None
    line = line_of(text, match.start() if match else 0)
    on_gpu = re.search(r"cuda|cublas|nccl", text, re.IGNORECASE) is not None
    if not on_gpu:
        return OutOfMemory(line, of_host=True)
    usage = parse_gpu_usage(str(error)) or measured
    if usage is None:
        return OutOfMemory(line)
    return OutOfMemory(
        line,
        foreign=describe_foreign_memory(usage, planned_bytes),
        fragmented=_is_fragmented(usage),
    )


def gpu_oom_class(text: str) -> str:
    """Returns `foreign_memory` or `fragmentation` if the sizes in the text show it, else empty."""
    usage = parse_gpu_usage(text)
    if usage is None:
        return ""
    if describe_foreign_memory(usage, None):
        return "foreign_memory"
    return "fragmentation" if _is_fragmented(usage) else ""


def _is_fragmented(usage: GpuMemoryUsage) -> bool:
    return 0 < usage.wanted <= usage.unused


def line_of(text: str, position: int, chars: int = EVIDENCE_CHARS) -> str:
    """Returns the line around a position, cut to so many characters."""
    start = text.rfind("\n", 0, position) + 1
    end = text.find("\n", position)
    return text[start : end if end >= 0 else None].strip()[:chars]


def describe_foreign_memory(usage: GpuMemoryUsage, planned_bytes: int | None) -> str:
    """Describes the other processes that hold the missing memory; empty if they do not hold it.

    They are the cause if they hold at least the missing memory, and if this process would not have
    exceeded its planned memory.
    """
    missing = usage.wanted - usage.free
    allowed = usage.total if planned_bytes is None else planned_bytes
    if usage.others_bytes < max(missing, 1) or usage.own + usage.wanted > allowed:
        return ""
    holders = ", ".join(f"{name} {format_bytes(size)}" for name, size in usage.others)
    planned = "" if planned_bytes is None else f" of the {format_bytes(planned_bytes)} planned"
    own = f"{format_bytes(usage.own)}{planned}"
    return (
        f"other processes hold {format_bytes(usage.others_bytes)} of the GPU's "
        f"{format_bytes(usage.total)} ({holders}); this run holds {own}"
    )


def parse_gpu_usage(text: str) -> GpuMemoryUsage | None:
    """Reads the sizes in PyTorch's message; None if it has none.

    In a container PyTorch does not know its own process id, and lists itself like another process.
    Then the listed process that holds what PyTorch has allocated, and least beyond it, is taken to
    be this one.
    """
    total = _bytes(rf"total capacity of {_SIZE}", text)
    free = _bytes(rf"of which {_SIZE} is free", text)
    if total is None or free is None:
        return None
    allocated = _bytes(rf"{_SIZE} is allocated by PyTorch", text) or 0
    unused = _bytes(rf"{_SIZE} is reserved by PyTorch but unallocated", text) or 0
    reserved = allocated + unused
    listed = [
        (f"process {number}", _size(size, unit))
        for number, size, unit in re.findall(rf"Process (\d+) has {_SIZE} memory in use", text)
    ]
    own = _bytes(rf"this process has {_SIZE} memory in use", text)
    others = listed
    if own is None:
        itself = min((p for p in listed if p[1] >= allocated), key=lambda p: p[1], default=None)
        own = itself[1] if itself else reserved
        others = [p for p in listed if p is not itself]
    elif own > total:
        # PyTorch prints a negative size without its sign: 17179869184.00 GiB.
        own = reserved
    if not listed:
        others = unlisted_processes(total, free, own)
    wanted = _bytes(rf"Tried to allocate {_SIZE}", text) or 0
    return GpuMemoryUsage(total, free, own, wanted, tuple(others), unused)


def unlisted_processes(total: int, free: int, own: int) -> list[tuple[str, int]]:
    """Returns what neither this process nor a free byte accounts for, as one other process."""
    size = total - free - own - CONTEXT_BYTES
    return [("unlisted", size)] if size > 0 else []


def _bytes(pattern: str, text: str) -> int | None:
    match = re.search(pattern, text)
    return _size(match[1], match[2]) if match else None


def _size(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])
