"""Caches of a rank on a node where the home cannot be written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpcft.core.paths import RunPaths, cache_folder
from hpcft.training.distributed import writable_caches
from hpcft.training.distributed.writable_caches import use_run_folder_if_needed


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restores all variables after the test."""
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_DATASETS_CACHE", "HF_ASSETS_CACHE",
                 "TRITON_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH",
                 "MPLCONFIGDIR"):  # fmt: skip
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_use_run_folder_if_needed_leaves_a_home_that_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    before = dict(os.environ)
    use_run_folder_if_needed(RunPaths(tmp_path / "run"))
    assert os.environ == before


def test_use_run_folder_if_needed_moves_the_caches_but_not_staged_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").touch()  # No folder can be made in it, not even by root.
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run = tmp_path / "run"
    use_run_folder_if_needed(RunPaths(run))
    assert cache_folder().is_relative_to(run)
    assert writable_caches.is_writable(cache_folder())
    assert os.environ["HF_HOME"] == str(tmp_path / "home/.cache/huggingface")
    moved = ("HF_DATASETS_CACHE", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    assert all(Path(os.environ[name]).is_relative_to(run) for name in moved)
