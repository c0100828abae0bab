"""The local profile: which GPUs of this machine a session may use."""

from __future__ import annotations

from pathlib import Path

import pytest

from builders import ROOT
from hpcft.config.cluster_profile import load_profile

LISTED = """\
0, GPU-aaaa-1, NVIDIA A100-SXM4-80GB, 81920, 8.0
1, GPU-bbbb-2, NVIDIA A100-SXM4-80GB, 81920, 8.0
2, GPU-cccc-3, NVIDIA T4, 15360, 7.5
3, GPU-dddd-4, NVIDIA T4, 15360, 7.5
"""


@pytest.mark.parametrize(
    ("visible", "count", "name"),
    [
        (None, 4, "NVIDIA-T4"),  # the smallest, since a plan has to fit every one
        ("0,1", 2, "NVIDIA-A100-SXM4-80GB"),
        ("2,3", 2, "NVIDIA-T4"),
        ("GPU-bbbb", 1, "NVIDIA-A100-SXM4-80GB"),
        ("1,-1,2", 1, "NVIDIA-A100-SXM4-80GB"),
        ("7", 0, ""),
        ("", 0, ""),
    ],
)
def test_load_profile_of_this_machine_counts_visible_gpus_only(
    visible: str | None, count: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "listed").write_text(LISTED)
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat '{tmp_path}/listed'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    cluster = load_profile(str(ROOT / "slurm/local.yaml")).cluster
    assert cluster.gpus_per_node == count
    assert (cluster.gpu.name if cluster.gpu else "") == name
    assert cluster.accelerator == ("cuda" if count else "cpu")
