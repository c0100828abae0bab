"""Whose memory ran out in this process: what an error says, and what the device says beside it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from hpcft.core.records import Plan
from hpcft.recovery.diagnosis.oom import (
    CONTEXT_BYTES,
    GpuMemoryUsage,
    OutOfMemory,
    parse_out_of_memory,
)

# Options of PyTorch's allocator: versions before 2.9 know the second name only, later ones go by
# the first.
_OPTIONS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_EXPANDS = "expandable_segments:True"


def segments_expandable(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether PyTorch's allocator may grow what it has reserved: then pieces are of use again."""
    return any(_EXPANDS in environment.get(name, "") for name in _OPTIONS)


def with_expandable_segments(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of a process whose allocator does so, beside what was asked of it."""
    given = [name for name in _OPTIONS if environment.get(name)] or _OPTIONS[1:]
    options = {name: ",".join(filter(None, [environment.get(name), _EXPANDS])) for name in given}
    return {**environment, **options}


def out_of_memory_of(error: BaseException, plan: Plan) -> OutOfMemory | None:
    """What an exception in a rank tells of missing memory; None where it tells of something else.

    Args:
        error: what was raised.
        plan: what the rank runs.
    """
    on_gpu = plan.accelerator == "cuda" and "torch" in sys.modules
    return parse_out_of_memory(error, plan.gpu_peak_bytes, _gpu_now() if on_gpu else None)


def can_fall_back(short: OutOfMemory, plan: Plan) -> bool:
    """Whether a lower rung may help: where this run's own use of what the plan fills is the cause.

    Every rung moves memory off the device; on GPUs none of them spares the node's.
    """
    return not short.foreign and not (short.of_host and plan.accelerator == "cuda")


def _gpu_now() -> GpuMemoryUsage | None:
    """Who holds what of this process's GPU now; other processes are one, for none is named."""
    import torch

    try:
        free, total = torch.cuda.mem_get_info()
    except RuntimeError:
        return None  # there is no device, or after some errors it answers no more
    own = torch.cuda.memory_reserved()
    unseen = total - free - own - CONTEXT_BYTES
    return GpuMemoryUsage(total, free, own, others=(("unseen", unseen),) if unseen > 0 else ())
