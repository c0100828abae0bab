"""Looks up what runs have measured of a plan's kind: the GPU, the layout and the model's size.

What a tiny run reaches of a processor says nothing of a large one, nor one GPU of another.
"""

from __future__ import annotations

import statistics
from typing import NamedTuple

from hpcft.core.records import Cluster, Layout, LearnedValue, ModelFacts, Precision

# Upper ends of the size classes, in parameters.
_SIZES = ((10**7, "under 10 M"), (10**8, "10 M to 100 M"), (10**9, "100 M to 1 B"),
          (10**10, "1 B to 10 B"))  # fmt: skip
_LARGEST = "over 10 B"


class PlanKind(NamedTuple):
    """Device, precision, layout and size, which decide what share of its peak a GPU reaches."""

    device: str
    """Name of the GPU; `cpu` without one."""
    precision: str
    """Compute precision."""
    layout: str
    """Kind of layout: how weights and states are sharded and offloaded."""
    size: str
    """Size class of the model."""

    def describe(self) -> str:
        """Returns the kind in words: `A100-SXM4-40GB, bf16, ZeRO-3, 1 B to 10 B parameters`."""
        return f"{self.device}, {self.precision}, {self.layout}, {self.size} parameters"


def plan_kind(
    cluster: Cluster, facts: ModelFacts, precision: Precision, layout: Layout
) -> PlanKind:
    """Returns the kind of a layout of a model on a cluster."""
    total = facts.parameters.total
    size = next((name for below, name in _SIZES if total < below), _LARGEST)
    kind = _layout_kind(layout) + ", 4-bit" * bool(facts.parameters.quantised)
    return PlanKind(device_name(cluster), precision, kind, size)


def device_name(cluster: Cluster) -> str:
    """Returns the name of the device that ranks of a cluster compute on."""
    has_gpu = cluster.accelerator == "cuda" and cluster.gpu is not None
    return cluster.gpu.name if has_gpu and cluster.gpu else "cpu"


def _layout_kind(layout: Layout) -> str:
    if layout.offload_optimizer != "none" or layout.offload_param != "none":
        return f"ZeRO-{layout.zero_stage} with offloading"
    if layout.zero_stage:
        return f"ZeRO-{layout.zero_stage}"
    return "one rank" if layout.world_size == 1 else "data parallel"


def learned_efficiency(cluster: Cluster, kind: PlanKind) -> LearnedValue | None:
    """Returns the efficiency that runs of a kind have measured; None if none have.

    Without runs of this layout those of others on the same device, of the same size and precision,
    count: otherwise a layout would look fast only because nobody has tried it.
    """
    alike = [
        value
        for value in _learned(cluster, "efficiency")
        if (value.device, value.precision, value.size) == (kind.device, kind.precision, kind.size)
    ]
    for value in alike:
        if value.layout == kind.layout:
            return value
    if not alike:
        return None
    runs = sorted({run for value in alike for run in value.runs})
    median = statistics.median(value.value for value in alike)
    return alike[0].model_copy(update={"layout": "", "value": median, "runs": runs})


def learned_bytes(cluster: Cluster, field: str) -> LearnedValue | None:
    """Returns the memory beside tensors that runs on the cluster's device have measured."""
    device = device_name(cluster)
    return next((v for v in _learned(cluster, field) if v.device == device), None)


def _learned(cluster: Cluster, field: str) -> list[LearnedValue]:
    return [value for value in cluster.calibration.learned if value.field == field]


def context_bytes(cluster: Cluster) -> int | None:
    """Returns the memory of a CUDA context where runs have measured it or the profile states it."""
    learned = learned_bytes(cluster, "context_bytes")
    return int(learned.value) if learned else cluster.calibration.context_bytes


def process_bytes(cluster: Cluster) -> int | None:
    """Returns the memory of a process where runs have measured it or the profile states it."""
    learned = learned_bytes(cluster, "process_bytes")
    return int(learned.value) if learned else cluster.calibration.process_bytes
