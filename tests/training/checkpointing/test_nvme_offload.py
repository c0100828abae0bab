"""Tests of states that DeepSpeed offloads to a node's disk, and whose files they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from builders import cluster, facts, plan_of, recipe, submitted_run
from hpcft.core.errors import DataError
from hpcft.core.paths import RunPaths
from hpcft.core.records import Cluster, Plan
from hpcft.recovery.run import Run
from hpcft.training.checkpointing import nvme_offload
from hpcft.training.distributed.rank_env import RankInfo

NVME = {"offload_optimizer": "nvme", "offload_param": "nvme"}


@pytest.fixture
def site(tmp_path: Path) -> Cluster:
    disk = tmp_path / "disk"
    disk.mkdir()
    return cluster("a100-80", node_disk_path=str(disk), node_disk_gib=100)


@pytest.fixture
def run(workplace: Path, site: Cluster) -> Run:
    """A run whose optimizer states and parameters are offloaded to the disk."""
    made = recipe(resources={"nodes": 1, "gpus_per_node": 2, "zero_stage": 3, **NVME})
    return submitted_run(workplace, made, site, plan_of(made, site, facts(100_000_000)))


def rank(number: int, job_id: str = "77") -> RankInfo:
    return RankInfo(number, 2, number, "n1", job_id)


def folders(run: Run, site: Cluster, who: RankInfo, restart_index: int = 0) -> set[Path]:
    """Returns where DeepSpeed offloads to at a start."""
    plan = nvme_offload.with_own_folder(run.read_plan(), run.paths, site, who, restart_index)
    assert plan.ds_config is not None
    sections = plan.ds_config["zero_optimization"]
    return {Path(sections[part]["nvme_path"]) for part in NVME}


def test_with_own_folder_gives_each_rank_run_and_start_another_one(
    run: Run, site: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Run(RunPaths(tmp_path / "elsewhere" / run.paths.folder.name), run.recipe, site)
    found = [
        nvme_offload.with_own_folder(run.read_plan(), paths, site, who, index)
        for paths in (run.paths, other.paths)  # Equal recipes have the same run id.
        for index in (0, 1)
        for who in (rank(0), rank(1), rank(0, "78"))
    ]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    found.append(nvme_offload.with_own_folder(run.read_plan(), run.paths, site, rank(0), 0))
    paths = [plan.ds_config["zero_optimization"]["offload_optimizer"]["nvme_path"]
             for plan in found if plan.ds_config]  # fmt: skip
    assert len({*paths}) == len(paths) == 13
    (disk,) = {Path(path).parents[2] for path in paths}
    assert str(disk) == site.node_disk_path
    assert {home.stat().st_mode & 0o777 for home in disk.iterdir()} == {0o700}


def test_with_own_folder_removes_what_an_earlier_start_has_left(run: Run, site: Cluster) -> None:
    (left,) = folders(run, site, rank(0, "76"))
    (left / "weights.swp").touch()
    (first,) = folders(run, site, rank(0))
    (second,) = folders(run, site, rank(1))
    (restarted,) = folders(run, site, rank(0), 1)
    assert not left.exists()
    assert not first.exists()
    assert not second.exists()
    assert restarted.is_dir()


def test_remove_own_folders_leaves_nothing_after_the_last_rank(run: Run, site: Cluster) -> None:
    (first,), (second,) = folders(run, site, rank(0)), folders(run, site, rank(1))
    (first / "weights.swp").touch()
    nvme_offload.remove_own_folders(run.paths, site, rank(0))
    assert (first.exists(), second.exists()) == (False, True)
    nvme_offload.remove_own_folders(run.paths, site, rank(1))
    assert [*Path(site.node_disk_path or "").iterdir()] == []


def test_with_own_folder_refuses_one_that_others_may_write_to(run: Run, site: Cluster) -> None:
    home = nvme_offload.offload_home(run.paths, site, rank(0))
    assert home is not None
    home.mkdir()
    home.chmod(0o777)
    with pytest.raises(DataError, match="expected a folder that only you can use"):
        folders(run, site, rank(0))
    home.rmdir()
    home.symlink_to(run.paths.folder)
    with pytest.raises(DataError, match="expected a folder that only you can use"):
        folders(run, site, rank(0))


def test_with_own_folder_on_a_full_or_missing_disk_says_what_to_do(run: Run, site: Cluster) -> None:
    Path(site.node_disk_path or "").rmdir()
    with pytest.raises(DataError, match=r"No such file .* set resources.offload_optimizer: cpu"):
        folders(run, site, rank(0))


def test_with_own_folder_leaves_a_plan_without_nvme_as_it_is(run: Run, site: Cluster) -> None:
    made = recipe(resources={"nodes": 1, "gpus_per_node": 2, "zero_stage": 3,
                             "offload_optimizer": "cpu", "offload_param": "cpu"})  # fmt: skip
    plan: Plan = plan_of(made, site, facts(100_000_000))
    assert nvme_offload.with_own_folder(plan, run.paths, site, rank(0), 0) is plan
    assert [*Path(site.node_disk_path or "").iterdir()] == []
