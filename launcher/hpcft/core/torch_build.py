"""Says which GPUs the installed PyTorch has code for.

Each build has machine code for some compute capabilities only: the wheels for CUDA 13 have none
below 7.5 (Turing).
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
from collections.abc import Sequence

from hpcft.core.disk_cache import load_or_compute
from hpcft.core.records import StoredRecord

INSTALL_GUIDE = "docs/guides/install.md lists the builds for each GPU"


class TorchBuild(StoredRecord):
    """The installed PyTorch."""

    version: str
    """Version with its build: `2.13.0+cu130`."""
    archs: list[str]
    """Architectures that it has code for: `sm_80`, `compute_90`; empty for a CPU build."""


def has_kernels(archs: Sequence[str], capability: float) -> bool:
    """Returns whether a build with these architectures runs on a GPU.

    Machine code (`sm_`) runs on its own major version from its minor version on, `sm_90a` on that
    capability alone; PTX (`compute_`) is compiled for all newer ones (NVIDIA, CUDA C++ Programming
    Guide, binary and PTX compatibility).
    """
    wanted = round(10 * capability)
    for arch in archs:
        match = re.fullmatch(r"(sm|compute)_(\d+)([a-z]?)", arch)
        if match is None:
            continue
        kind, number, exact = match[1], int(match[2]), match[3]
        is_same_major = number // 10 == wanted // 10
        if number == wanted or (
            number < wanted and not exact and (kind == "compute" or is_same_major)
        ):
            return True
    return False


def why_no_kernels(build: TorchBuild, gpu: str, capability: float) -> str:
    """Returns why a build cannot run on a GPU; empty if it can, or has no code for any GPU."""
    if not build.archs or has_kernels(build.archs, capability):
        return ""
    archs = ", ".join(build.archs)
    return (
        f"torch {build.version} has no code for {gpu} (compute capability {capability:.1f}), "
        f"only for {archs}"
    )


@functools.cache
def installed_build() -> TorchBuild:
    """Returns the installed PyTorch; it is imported once, then the cache knows."""
    spec = importlib.util.find_spec("torch")
    key = f"{importlib.metadata.version('torch')} {spec and spec.origin}"
    return load_or_compute("torch_build", key, TorchBuild, _ask_torch)


def _ask_torch() -> TorchBuild:
    import torch

    # torch.cuda.get_arch_list() is empty on a login node without a GPU; this is what it reads.
    flags = torch._C._cuda_getArchFlags() if hasattr(torch._C, "_cuda_getArchFlags") else None
    return TorchBuild(version=torch.__version__, archs=(flags or "").split())
