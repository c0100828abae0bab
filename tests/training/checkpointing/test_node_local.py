"""Tests of checkpoints that are written to a node's own disk first."""

from __future__ import annotations

from pathlib import Path

import pytest

from builders import cluster
from hpcft.core.paths import RunPaths
from hpcft.training.checkpointing import node_local
from hpcft.training.distributed.rank_env import RankInfo


def test_async_copy_copies_all_files_and_removes_source(tmp_path: Path) -> None:
    source, target = tmp_path / "near", tmp_path / "far"
    (source / "global_step2").mkdir(parents=True)
    (source / "global_step2/shard.pt").write_bytes(b"x" * 100)
    target.mkdir()
    (target / "of another node").touch()
    copy = node_local.AsyncCopy(source, target)
    copy.wait()
    assert copy.is_done
    assert (target / "global_step2/shard.pt").read_bytes() == b"x" * 100
    assert (target / "of another node").exists()
    assert not source.exists()


def test_async_copy_source_is_target_keeps_files(tmp_path: Path) -> None:
    (tmp_path / "shard.pt").touch()
    node_local.AsyncCopy(tmp_path, tmp_path).wait()
    assert (tmp_path / "shard.pt").exists(), "it only had to be flushed to the disk"


def test_async_copy_file_cannot_be_written_raises_on_wait(tmp_path: Path) -> None:
    source, target = tmp_path / "near", tmp_path / "far"
    source.mkdir()
    (source / "shard.pt").touch()
    (target / "shard.pt").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        node_local.AsyncCopy(source, target).wait()


def test_async_copy_any_other_error_is_raised_on_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "near").mkdir()
    (tmp_path / "near/shard.pt").touch()

    def fails(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(node_local.shutil, "copyfile", fails)
    with pytest.raises(MemoryError):
        node_local.AsyncCopy(tmp_path / "near", tmp_path / "far").wait()


def test_prepare_node_folder_no_disk_in_profile_returns_none(tmp_path: Path) -> None:
    rank = RankInfo(0, 1, 0, "n1", "7")
    assert node_local.prepare_node_folder(RunPaths(tmp_path), cluster("local"), rank) is None


def test_prepare_node_folder_creates_private_folder(tmp_path: Path) -> None:
    paths, rank = RunPaths(tmp_path), RankInfo(0, 1, 0, "n1", "7")
    site = cluster("local", node_disk_path=str(tmp_path))
    folder = node_local.prepare_node_folder(paths, site, rank)
    assert folder is not None
    assert folder == node_local.node_folder(paths, site, rank)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert node_local.has_room(folder, 1)
    assert not node_local.has_room(folder, 1 << 60)


def test_prepare_node_folder_of_somebody_else_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A link stands for a folder that cannot be removed."""
    paths, rank = RunPaths(tmp_path), RankInfo(0, 1, 0, "n1", "7")
    site = cluster("local", node_disk_path=str(tmp_path))
    folder = node_local.node_folder(paths, site, rank)
    assert folder is not None
    folder.symlink_to(tmp_path)
    assert node_local.prepare_node_folder(paths, site, rank) is None
    assert "so checkpoints are written to the run folder directly" in caplog.text
