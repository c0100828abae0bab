"""Measures what a core of this machine gives, for plans of runs on its CPUs.

Data sheets say little about a laptop, and nothing about the time that Python takes to start small
operators. Both are measured by training steps of one thread, in a second, once for each machine.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

from hpcft.core.disk_cache import load_or_compute
from hpcft.core.records import StoredRecord
from hpcft.planning.hardware import CORE_GFLOPS

VERSION = 1  # raised when what is measured changes, so that earlier cache files are not read
MEASURING_S = 0.4
MIN_STEPS = 3
# Width of the layers that are measured: one whose arithmetic takes no time, one with little else.
NARROW, WIDE = 64, 512


class CoreSpeed(StoredRecord):
    """Speed that training reaches on one core of a machine."""

    gflops: float
    """FLOP/s in fp32, in 10⁹."""
    layer_s: float
    """Seconds of a step, optimizer included, of a layer that has nothing to compute."""

    @property
    def efficiency(self) -> float:
        """Share of the peak FLOP/s that hpcft assumes of a core."""
        return self.gflops / CORE_GFLOPS


def core_speed() -> CoreSpeed:
    """Returns the speed of a core of this machine, measured at the first call and then cached."""
    machine = [platform.node(), _cpu_model(), os.cpu_count(), importlib.metadata.version("torch")]
    return load_or_compute("core_speed", json.dumps([VERSION, *machine]), CoreSpeed, measure)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2] for line in lines if line.startswith("model name")), "")


def measure() -> CoreSpeed:
    """Measures training steps of one thread; the fastest counts, for others use the machine too."""
    import torch

    threads, generator = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    try:
        narrow_s = _fastest(_training_step(NARROW, rows=1, tokens=8, with_optimizer=True))
        rows, tokens = 2, 128
        wide_s = _fastest(_training_step(WIDE, rows=rows, tokens=tokens, with_optimizer=False))
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(generator)
    # 6 for each of the 12 H² weights of a layer, and 12·S·H of attention (see step_time).
    flops = rows * tokens * (6 * 12 * WIDE**2 + 12 * tokens * WIDE)
    return CoreSpeed(gflops=flops / wide_s / 1e9, layer_s=narrow_s)


def _training_step(
    width: int, *, rows: int, tokens: int, with_optimizer: bool
) -> Callable[[], None]:
    """Returns a function that runs a training step of one layer."""
    import torch

    layer = torch.nn.TransformerEncoderLayer(width, width // 64, 4 * width, 0.0, batch_first=True)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-6)
    inputs = torch.randn(rows, tokens, width)

    def step() -> None:
        layer(inputs).sum().backward()
        if with_optimizer:
            optimizer.step()
            optimizer.zero_grad()

    return step


def _fastest(step: Callable[[], None]) -> float:
    """Returns the seconds of the fastest of some steps; the first, which allocates, is left out."""
    step()
    seconds: list[float] = []
    while len(seconds) < MIN_STEPS or sum(seconds) < MEASURING_S:
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
