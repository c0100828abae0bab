"""Measures a rank: peak memory by phase, and the time of optimizer steps."""

from __future__ import annotations

import contextlib
import statistics
import time
from pathlib import Path

import torch

from hpcft.core.records import PhasePeaks

WARM_UP_STEPS = 2
"""Number of first steps that are not timed: they load kernels, and choose algorithms."""
_OWN_PROCESS = Path("/proc/self")


def memory_now_bytes() -> int:
    """Returns the memory in use now: allocated on a GPU, or the resident set size on a CPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.memory_allocated())
    return _resident_bytes("VmRSS")


class PeakTracker:
    """Measures this process's peak memory, phase by phase; a repeated phase keeps its largest."""

    def __init__(self) -> None:
        self.phases: dict[str, PhasePeaks] = {}
        self._reset()

    def end_phase(self, phase: str) -> None:
        """Records the peaks of the phase that ends now, and starts the next one."""
        previous = [self.phases[phase]] if phase in self.phases else []
        self.phases[phase] = _max_of_each_field([*previous, _peaks_since_reset()])
        self._reset()

    def largest_bytes(self) -> int:
        """Returns the largest peak of all phases, the current one included."""
        return largest_peak_bytes([*self.phases.values(), _peaks_since_reset()])

    def _reset(self) -> None:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.reset_peak_memory_stats()
        # Writing 5 resets the peak of the resident set (proc_pid_clear_refs(5)). Where that is not
        # allowed, a phase has the peak of all phases before it.
        with contextlib.suppress(OSError):
            (_OWN_PROCESS / "clear_refs").write_text("5", encoding="utf-8")


class StepTimer:
    """Times optimizer steps with all their micro-batches, without logs, evaluations and saves."""

    def __init__(self) -> None:
        self._started = 0.0
        self._steps_s: list[float] = []

    def start(self) -> None:
        """Starts the timer at the beginning of a step."""
        self._started = time.perf_counter()

    def stop(self) -> None:
        """Stops the timer at the end of a step."""
        self._steps_s.append(time.perf_counter() - self._started)

    @property
    def count(self) -> int:
        """Number of steps in the median."""
        return len(self._steps_s[WARM_UP_STEPS:])

    @property
    def median_s(self) -> float | None:
        """Median seconds of a step; None before the first step that counts."""
        return statistics.median(self._steps_s[WARM_UP_STEPS:]) if self.count else None


def largest_peak_bytes(peaks: list[PhasePeaks]) -> int:
    """Returns the largest peak: GPU memory reserved, or the resident set size on a CPU."""
    return max(p.resident_bytes if p.reserved_bytes is None else p.reserved_bytes for p in peaks)


def merge_ranks(
    ranks: list[tuple[str, dict[str, PhasePeaks]]], other_processes_bytes: int
) -> dict[str, PhasePeaks]:
    """Merges the peaks of all ranks, by phase.

    Args:
        ranks: node and peaks by phase, for each rank.
        other_processes_bytes: memory that the plan expects other processes to hold on each GPU.

    Returns:
        The largest peak of a rank; and for the host the largest sum over the ranks of a node.
    """
    phases: dict[str, PhasePeaks] = {}
    for phase in dict.fromkeys(name for _, peaks in ranks for name in peaks):
        host_bytes: dict[str, int] = {}
        of_phase = [(node, peaks[phase]) for node, peaks in ranks if phase in peaks]
        for node, peak in of_phase:
            host_bytes[node] = host_bytes.get(node, 0) + peak.resident_bytes
        largest = _max_of_each_field([peak for _, peak in of_phase])
        device_bytes = largest.device_bytes
        if device_bytes:
            device_bytes = max(0, device_bytes - other_processes_bytes)
        phases[phase] = largest.model_copy(
            update={"host_bytes": max(host_bytes.values()), "device_bytes": device_bytes}
        )
    return phases


def _max_of_each_field(peaks: list[PhasePeaks]) -> PhasePeaks:
    fields: dict[str, int] = {}
    for peak in peaks:
        for name, value in peak.model_dump(exclude_none=True).items():
            fields[name] = max(value, fields.get(name, 0))
    return PhasePeaks(**fields)


def _peaks_since_reset() -> PhasePeaks:
    resident = _resident_bytes("VmHWM")
    if not torch.cuda.is_available():
        return PhasePeaks(resident_bytes=resident)
    # Asking CUDA for its memory would initialise it, perhaps on the GPU of another rank.
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
        # Memory outside the allocator is measured now, the allocator's own at its peak.
        device_bytes=total - free - torch.cuda.memory_reserved() + reserved,
    )


def _resident_bytes(field: str) -> int:
    """Returns the resident set size, now (`VmRSS`) or at its peak (`VmHWM`); both are in KiB.

    `getrusage` would not do: its peak starts with that of the parent process.
    """
    lines = (_OWN_PROCESS / "status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])
