"""Whether an error means that memory ran out, and whose: this run's, or other processes'."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hpcft.core.units import GIB, KIB, MIB, format_bytes

EVIDENCE_CHARS = 300
# What a process holds that PyTorch does not count, where nobody lists it: the CUDA context.
CONTEXT_BYTES = GIB

# `Cannot allocate memory` is ENOMEM in words, `std::bad_alloc` what C++ throws.
_TEXT = re.compile(
    r"out of memory|CUBLAS_STATUS_ALLOC_FAILED|an't allocate memory|annot allocate memory"
    r"|std::bad_alloc",
    re.IGNORECASE,
)
_SIZE = r"([\d.]+) (bytes|KiB|MiB|GiB)"
_UNITS = {"bytes": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB}


@dataclass(frozen=True)
class GpuMemoryUsage:
    """Who held what of a GPU when memory ran out, in bytes."""

    total: int
    """Memory of the GPU."""
    free: int
    """What nobody held."""
    own: int
    """What this process held."""
    wanted: int = 0
    """What it asked for in vain."""
    others: tuple[tuple[str, int], ...] = ()
    """Other processes by name, and what each held."""
    unused: int = 0
    """What PyTorch had reserved, in pieces that it could not use."""

    @property
    def others_bytes(self) -> int:
        """What the others held together."""
        return sum(size for _, size in self.others)


@dataclass(frozen=True)
class OutOfMemory:
    """Memory ran out."""

    evidence: str
    """The line that says so."""
    of_host: bool = False
    """Whether it was the node's memory, and not a GPU's."""
    foreign: str = ""
    """Who else held it, as a sentence; empty where it was this run's own doing."""
    fragmented: bool = False
    """Whether what was asked for would have fitted into what PyTorch held unused, in pieces."""


def parse_out_of_memory(
    error: BaseException, planned_bytes: int | None = None, seen: GpuMemoryUsage | None = None
) -> OutOfMemory | None:
    """What an exception tells of missing memory; None where it tells of something else.

    Args:
        error: what was raised, on a GPU or on a CPU.
        planned_bytes: what the plan predicts for this process.
        seen: what the device said, for errors whose text names no figures.
    """
    text = f"{type(error).__name__}: {error}"
    found = _TEXT.search(text)
    if found is None and not isinstance(error, MemoryError):
        return None
    line = line_of(text, found.start() if found else 0)
    on_gpu = re.search(r"cuda|cublas|nccl", text, re.IGNORECASE) is not None
    if not on_gpu:
        return OutOfMemory(line, of_host=True)
    use = parse_gpu_usage(str(error)) or seen
    if use is None:
        return OutOfMemory(line)
    return OutOfMemory(line, foreign=foreign_memory(use, planned_bytes), fragmented=_in_pieces(use))


def gpu_oom_class(text: str) -> str:
    """What figures make of a GPU's shortage: `foreign_memory`, `fragmentation`, or nothing."""
    use = parse_gpu_usage(text)
    if use is None:
        return ""
    if foreign_memory(use, None):
        return "foreign_memory"
    return "fragmentation" if _in_pieces(use) else ""


def _in_pieces(use: GpuMemoryUsage) -> bool:
    return 0 < use.wanted <= use.unused


def line_of(text: str, position: int, chars: int = EVIDENCE_CHARS) -> str:
    """The line around a position, cut to what a table can hold."""
    start = text.rfind("\n", 0, position) + 1
    end = text.find("\n", position)
    return text[start : end if end >= 0 else None].strip()[:chars]


def foreign_memory(use: GpuMemoryUsage, planned_bytes: int | None) -> str:
    """Who else holds the memory that is missing, as a sentence; empty where it is not theirs.

    It is theirs if they hold at least what was missing, and if this process would have had no more
    than was planned for it.
    """
    missing = use.wanted - use.free
    allowed = use.total if planned_bytes is None else planned_bytes
    if use.others_bytes < max(missing, 1) or use.own + use.wanted > allowed:
        return ""
    named = ", ".join(f"{name} {format_bytes(size)}" for name, size in use.others)
    planned = "" if planned_bytes is None else f" of the {format_bytes(planned_bytes)} planned"
    return (
        f"other processes hold {format_bytes(use.others_bytes)} of the GPU's "
        f"{format_bytes(use.total)} ({named}); this run holds {format_bytes(use.own)}{planned}"
    )


def parse_gpu_usage(text: str) -> GpuMemoryUsage | None:
    """The figures in PyTorch's message; None where it has none.

    In a container PyTorch cannot tell which process it is itself and names itself by number too:
    then the listed process that holds what PyTorch has allocated, and least beyond it, is itself.
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
        # 17179869184.00 GiB has been seen: less than nothing, printed without a sign.
        own = reserved
    if not listed:
        unseen = total - free - own - CONTEXT_BYTES
        others = [("unseen", unseen)] if unseen > 0 else []
    wanted = _bytes(rf"Tried to allocate {_SIZE}", text) or 0
    return GpuMemoryUsage(total, free, own, wanted, tuple(others), unused)


def _bytes(pattern: str, text: str) -> int | None:
    match = re.search(pattern, text)
    return _size(match[1], match[2]) if match else None


def _size(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])
