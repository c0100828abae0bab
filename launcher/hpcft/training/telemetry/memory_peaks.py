"""What a rank needs: memory by phase, and the time of an optimizer step."""

from __future__ import annotations

import contextlib
import statistics
import time
from pathlib import Path

import torch

from hpcft.core.records import PhasePeaks

# The first steps start kernels for the first time, and find their algorithms.
WARM_UP_STEPS = 2
_OWN = Path("/proc/self")


def memory_now_bytes() -> int:
    """Device memory allocated on a GPU; resident set of this process on a CPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.memory_allocated())
    return _resident_bytes("VmRSS")


class Peaks:
    """Peaks of this process, phase by phase; one that comes again adds to what it was."""

    def __init__(self) -> None:
        self.phases: dict[str, PhasePeaks] = {}
        self._begin()

    def end(self, phase: str) -> None:
        """Ends a phase, and begins the next."""
        self.phases[phase] = _larger([*self._earlier(phase), _peaks_since()])
        self._begin()

    def most_bytes(self) -> int:
        """The peak of all phases, with the one that goes on."""
        return most_bytes([*self.phases.values(), _peaks_since()])

    def _earlier(self, phase: str) -> list[PhasePeaks]:
        return [self.phases[phase]] if phase in self.phases else []

    def _begin(self) -> None:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.reset_peak_memory_stats()
        # 5 starts the resident set's peak anew (proc_pid_clear_refs(5)); where that is not allowed,
        # a phase has the peak of all before it.
        with contextlib.suppress(OSError):
            (_OWN / "clear_refs").write_text("5")


class StepTimes:
    """How long optimizer steps take, micro-batches included, without logging, scoring, saving."""

    def __init__(self) -> None:
        self._begun = 0.0
        self._steps_s: list[float] = []

    def begin(self) -> None:
        """A step begins."""
        self._begun = time.perf_counter()

    def end(self) -> None:
        """It is done."""
        self._steps_s.append(time.perf_counter() - self._begun)

    @property
    def count(self) -> int:
        """Steps that the median is of."""
        return len(self._steps_s[WARM_UP_STEPS:])

    @property
    def median_s(self) -> float | None:
        """Their median; None before the first that counts."""
        return statistics.median(self._steps_s[WARM_UP_STEPS:]) if self.count else None


def most_bytes(peaks: list[PhasePeaks]) -> int:
    """The largest peak: device memory reserved on a GPU, resident set on a CPU."""
    return max(p.resident_bytes if p.reserved_bytes is None else p.reserved_bytes for p in peaks)


def of_all_ranks(
    found: list[tuple[str, dict[str, PhasePeaks]]], others_bytes: int
) -> dict[str, PhasePeaks]:
    """The peaks of a run by phase.

    Args:
        found: of each rank its node and its peaks.
        others_bytes: what other processes are known to hold on each GPU.
    """
    phases: dict[str, PhasePeaks] = {}
    for phase in dict.fromkeys(name for _, peaks in found for name in peaks):
        nodes: dict[str, int] = {}
        of_phase = [(node, peaks[phase]) for node, peaks in found if phase in peaks]
        for node, peak in of_phase:
            nodes[node] = nodes.get(node, 0) + peak.resident_bytes
        most = _larger([peak for _, peak in of_phase])
        device = most.device_bytes and max(0, most.device_bytes - others_bytes)
        phases[phase] = most.model_copy(
            update={"host_bytes": max(nodes.values()), "device_bytes": device}
        )
    return phases


def _larger(peaks: list[PhasePeaks]) -> PhasePeaks:
    """The larger value of each field."""
    fields: dict[str, int] = {}
    for peak in peaks:
        for name, value in peak.model_dump(exclude_none=True).items():
            fields[name] = max(value, fields.get(name, 0))
    return PhasePeaks(**fields)


def _peaks_since() -> PhasePeaks:
    """What this process held at most since its counters were reset."""
    resident = _resident_bytes("VmHWM")
    if not torch.cuda.is_available():
        return PhasePeaks(resident_bytes=resident)
    # Asking would start it, maybe on the device of another rank.
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return PhasePeaks(
            resident_bytes=resident, allocated_bytes=0, reserved_bytes=0, device_bytes=0
        )
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.max_memory_reserved()
    return PhasePeaks(
        resident_bytes=resident,
        allocated_bytes=torch.cuda.max_memory_allocated(),
        reserved_bytes=reserved,
        # What is there besides the allocator's, now, and the allocator's at its peak.
        device_bytes=total - free - torch.cuda.memory_reserved() + reserved,
    )


def _resident_bytes(field: str) -> int:
    """The resident set now (`VmRSS`) or at its peak (`VmHWM`); Linux counts both in KiB.

    `getrusage` will not do: its peak begins with that of the process that started this one.
    """
    lines = (_OWN / "status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])
