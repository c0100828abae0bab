"""Tests which GPUs a build of PyTorch has code for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from builders import ROOT, Cli, run_plan
from hpcft.core import torch_build
from hpcft.core.errors import UsageError
from hpcft.core.torch_build import TorchBuild, has_kernels, installed_build
from hpcft.training.distributed import rank_env

# What torch 2.13.0+cu130 and 2.7.1+cu126 say.
CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
CUDA_12 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (CUDA_13, 7.0, False),
        (CUDA_13, 6.0, False),
        (CUDA_13, 7.5, True),
        (CUDA_13, 8.9, True),  # code for 8.6 runs on all later 8.x
        (CUDA_13, 12.1, True),
        (CUDA_12, 6.1, True),
        (CUDA_12, 7.0, True),
        (CUDA_12, 10.0, False),
        ([*CUDA_12, "compute_90"], 10.0, True),  # compiled by the driver
        (["sm_90a"], 9.0, True),
        (["sm_90a", "compute_90a"], 10.0, False),
        (["sm_80"], 7.5, False),
        ([], 8.0, False),
    ],
)
def test_has_kernels_follows_cudas_rules(archs: list[str], capability: float, runs: bool) -> None:
    assert has_kernels(archs, capability) == runs


def test_installed_build_is_this_torch() -> None:
    import torch

    build = installed_build()
    assert build.version == torch.__version__
    assert bool(build.archs) == (torch.version.cuda is not None)


def use_build(monkeypatch: pytest.MonkeyPatch) -> None:
    build = TorchBuild(version="2.13.0+cu130", archs=CUDA_13)
    monkeypatch.setattr("hpcft.planning.resource_checks.installed_build", lambda: build)


def test_plan_refuses_a_gpu_that_the_installed_torch_has_no_code_for(
    cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_build(monkeypatch)
    refused = cli("plan", tiny, "-c", "v100-16")
    assert refused.code == 2
    assert "torch 2.13.0+cu130 has no code for V100-SXM2-16GB (compute capability 7.0)" in (
        refused.err
    )
    assert "docs/guides/install.md" in refused.err
    assert cli("plan", tiny, "-c", "t4-16").code == 0
    text = (ROOT / "slurm/v100-16.yaml").read_text().replace("name: v100-16", "name: mine")
    (tiny.parent / "mine.yaml").write_text(text + "setup: [module load torch-cu126]\n")
    warned = cli("plan", tiny, "-c", "mine.yaml")
    assert warned.code == 0, "the job may have another environment than this one"
    assert "the job fails in its first second unless" in warned.err


def test_rank_says_at_once_that_its_torch_has_no_code_for_its_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    answers: dict[str, Any] = {"is_available": True, "get_device_capability": (7, 0),
                               "get_arch_list": CUDA_13, "get_device_name": "V100"}  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setitem(os.environ, "LOCAL_RANK", "1")
    on_gpu = run_plan(accelerator="cuda")
    with pytest.raises(UsageError, match="has no code for V100"):
        rank_env.check_gpu(on_gpu)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CUDA_12)
    rank_env.check_gpu(on_gpu)
    assert torch_build.why_no_kernels(TorchBuild(version="2.13.0+cpu", archs=[]), "T4", 7.5) == ""
