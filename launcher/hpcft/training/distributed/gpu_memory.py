"""Reads the out-of-memory errors of this process, and sets its CUDA allocator."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from hpcft.core.records import Plan
from hpcft.recovery.diagnosis.oom import (
    GpuMemoryUsage,
    OutOfMemory,
    parse_out_of_memory,
    unlisted_processes,
)

# Variables with the options of PyTorch's allocator. Versions before 2.9 know only the second one;
# later versions read the first one first.
_OPTIONS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_EXPANDABLE = "expandable_segments:True"


def segments_expandable(environment: Mapping[str, str] = os.environ) -> bool:
    """Returns whether PyTorch's allocator uses expandable segments, which do not fragment."""
    return any(_EXPANDABLE in environment.get(name, "") for name in _OPTIONS)


def with_expandable_segments(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Returns an environment with expandable segments, added to the options that it has."""
    names = [name for name in _OPTIONS if environment.get(name)] or _OPTIONS[1:]
    options = {name: ",".join(filter(None, [environment.get(name), _EXPANDABLE])) for name in names}
    return {**environment, **options}


def out_of_memory_of(
    error: BaseException, plan: Plan, planned_bytes: int | None
) -> OutOfMemory | None:
    """Reads an exception of this rank; returns None if it does not mean that memory ran out.

    Args:
        error: the exception.
        plan: the plan that the rank runs.
        planned_bytes: memory per rank that the submitted plan predicts; None if it predicts none.
    """
    on_gpu = plan.accelerator == "cuda" and "torch" in sys.modules
    return parse_out_of_memory(error, planned_bytes, _measure_gpu() if on_gpu else None)


def can_fall_back(shortage: OutOfMemory, plan: Plan) -> bool:
    """Returns whether a fallback may help: whether this run itself filled the memory.

    Every fallback moves memory off the device; on GPUs none of them saves memory of the node.
    """
    return not shortage.foreign and not (shortage.of_host and plan.accelerator == "cuda")


def _measure_gpu() -> GpuMemoryUsage | None:
    """Measures the memory of this process's GPU; the driver lists other processes only in sum."""
    import torch

    try:
        free, total = torch.cuda.mem_get_info()
    except RuntimeError:
        return None  # There is no device, or it stopped responding after the error.
    own = torch.cuda.memory_reserved()
    return GpuMemoryUsage(total, free, own, others=tuple(unlisted_processes(total, free, own)))
