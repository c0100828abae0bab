"""What a run measures of itself: peaks of its phases and ranks, and the time of a step."""

from __future__ import annotations

import pytest

from builders import cluster, facts, plan_of, recipe
from hpcft.core.records import PhasePeaks
from hpcft.core.units import MIB


def test_a_phase_has_its_own_peak() -> None:
    from hpcft.training.telemetry.memory_peaks import Peaks

    peaks = Peaks()
    held = b"x" * (300 * MIB)
    del held  # what a phase leaves behind is the next one's too
    peaks.end("large")
    peaks.end("small")
    phases = dict(peaks.phases)
    assert phases["large"].resident_bytes - phases["small"].resident_bytes > 200 * MIB
    assert phases["large"].reserved_bytes is None, "there is no device"
    held = b"x" * (300 * MIB)
    assert peaks.most_bytes() >= phases["large"].resident_bytes
    peaks.end("small")
    assert peaks.phases["small"].resident_bytes > phases["small"].resident_bytes + 200 * MIB
    assert len(held) == 300 * MIB


def test_of_all_ranks_the_largest_counts_and_a_node_is_their_sum() -> None:
    from hpcft.training.telemetry.memory_peaks import most_bytes, of_all_ranks

    one = PhasePeaks(resident_bytes=5, allocated_bytes=1, reserved_bytes=4, device_bytes=9)
    two = PhasePeaks(resident_bytes=3, allocated_bytes=2, reserved_bytes=2, device_bytes=8)
    found = of_all_ranks([("a", {"training": one, "saving": one}), ("a", {"training": two}),
                          ("b", {"training": two})], others_bytes=1)  # fmt: skip
    assert found["training"] == PhasePeaks(resident_bytes=5, host_bytes=8, allocated_bytes=2,
                                           reserved_bytes=4, device_bytes=8)  # fmt: skip
    assert found["saving"].host_bytes == 5
    assert most_bytes([one, two]) == 4


def test_the_first_steps_do_not_count() -> None:
    from hpcft.training.telemetry.memory_peaks import StepTimes

    times = StepTimes()
    for done in range(4):
        assert times.count == max(0, done - 2)
        assert (times.median_s is None) == (done <= 2)
        times.begin()
        times.end()


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 0), (1, 2)])
def test_a_rank_that_is_alone_is_told_of_no_group(
    ranks: int, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its model is wrapped for others, and every gradient held twice."""
    import os

    from hpcft.training.distributed import rank_env

    shape = {"nodes": 1, "gpus_per_node": ranks, "zero_stage": stage}
    offload = {"offload_optimizer": "cpu"} if stage and ranks == 1 else {}
    plan = plan_of(recipe(resources=shape | offload), cluster("a100-80"), facts(100_000_000))
    monkeypatch.setattr(os, "environ", {"CUDA_VISIBLE_DEVICES": "3,4"})
    rank_env._set_environment(rank_env.RankInfo(0, ranks, 0, "here", "1"), plan)
    alone = (ranks, stage) == (1, 0)
    assert rank_env.single_process(plan) == alone
    assert ("WORLD_SIZE" in os.environ) == ("LOCAL_RANK" in os.environ) == (not alone)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ("3" if alone else "3,4")
