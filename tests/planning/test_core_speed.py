"""Tests that plans for the CPUs of this machine use what it was measured to give."""

from __future__ import annotations

from pathlib import Path

import pytest

from builders import Cli, cluster, facts, layout, plan_inputs, recipe
from hpcft.planning import core_speed, step_time
from hpcft.planning.core_speed import CoreSpeed
from hpcft.planning.hardware import CORE_GFLOPS

pytestmark = pytest.mark.usefixtures("cache_of_this_module")


def test_measure_uses_one_thread_and_leaves_torch_as_it_was() -> None:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.manual_seed(1)
        expected = torch.rand(3)
        torch.manual_seed(1)
        measured = core_speed.measure()
        assert torch.equal(torch.rand(3), expected)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert 1 < measured.gflops < 1000
    assert 1e-5 < measured.layer_s < 0.5


def test_core_speed_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def measure() -> CoreSpeed:
        calls.append(1)
        return CoreSpeed(gflops=32.0, layer_s=0.001)

    monkeypatch.setattr(core_speed, "measure", measure)
    monkeypatch.setattr(core_speed, "VERSION", "of this test")
    assert core_speed.core_speed() == core_speed.core_speed()
    assert calls == [1]


def test_step_time_follows_the_measured_core() -> None:
    made = recipe(resources={"nodes": 1, "gpus_per_node": 2})
    site = cluster("local", cores_per_node=2)
    slow, fast = (
        plan_inputs(made, site, facts(100_000_000), core=CoreSpeed(gflops=g, layer_s=s))
        for g, s in ((16.0, 0.002), (64.0, 0.0005))
    )
    assert slow.rates(layout(0, 2)).flops == pytest.approx(16e9), "a core for each of two ranks"
    assert slow.efficiency(layout(0, 2)) == 16.0 / CORE_GFLOPS
    for stage in (0, 3):
        seconds = [
            step_time.predict_step_time(inputs, layout(stage, 2)).compute_s
            for inputs in (slow, fast)
        ]
        assert seconds[0] == pytest.approx(4 * seconds[1])


def test_only_plans_for_the_cpus_of_this_machine_are_measured(
    cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = CoreSpeed(gflops=12.5, layer_s=0.001)
    monkeypatch.setattr("hpcft.planning.feasibility.core_speed", lambda: known)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    reasons = cli("plan", tiny, "-c", "local", "--json").json["reasons"]
    assert "speed as measured on this machine: 12.5 GFLOP/s a core" in reasons
    for site in ("cpu", "a100-80"):
        elsewhere = cli("plan", tiny, "-c", site, "--json").json["reasons"]
        assert not any("measured on this machine" in reason for reason in elsewhere)
