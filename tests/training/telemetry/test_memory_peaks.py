"""Tests of what a run measures: peak memory by phase and rank, and the time of steps."""

from __future__ import annotations

from hpcft.core.records import PhasePeaks
from hpcft.core.units import MIB


def test_peak_tracker_two_phases_have_their_own_peaks() -> None:
    from hpcft.training.telemetry.memory_peaks import PeakTracker

    peaks = PeakTracker()
    held = b"x" * (300 * MIB)
    del held  # Otherwise the next phase would hold it too.
    peaks.end_phase("large")
    peaks.end_phase("small")
    phases = dict(peaks.phases)
    assert phases["large"].resident_bytes - phases["small"].resident_bytes > 200 * MIB
    assert phases["large"].reserved_bytes is None, "there is no device"
    held = b"x" * (300 * MIB)
    assert peaks.largest_bytes() >= phases["large"].resident_bytes
    peaks.end_phase("small")
    assert peaks.phases["small"].resident_bytes > phases["small"].resident_bytes + 200 * MIB
    assert len(held) == 300 * MIB


def test_merge_ranks_takes_largest_rank_and_sum_of_a_node() -> None:
    from hpcft.training.telemetry.memory_peaks import largest_peak_bytes, merge_ranks

    one = PhasePeaks(resident_bytes=5, allocated_bytes=1, reserved_bytes=4, device_bytes=9)
    two = PhasePeaks(resident_bytes=3, allocated_bytes=2, reserved_bytes=2, device_bytes=8)
    ranks = [("a", {"training": one, "saving": one}), ("a", {"training": two}),
             ("b", {"training": two})]  # fmt: skip
    phases = merge_ranks(ranks, other_processes_bytes=1)
    assert phases["training"] == PhasePeaks(resident_bytes=5, host_bytes=8, allocated_bytes=2,
                                            reserved_bytes=4, device_bytes=8)  # fmt: skip
    assert phases["saving"].host_bytes == 5
    assert largest_peak_bytes([one, two]) == 4


def test_step_timer_leaves_first_steps_out() -> None:
    from hpcft.training.telemetry.memory_peaks import StepTimer

    timer = StepTimer()
    for done in range(4):
        assert timer.count == max(0, done - 2)
        assert (timer.median_s is None) == (done <= 2)
        timer.start()
        timer.stop()
