"""Keeps what DeepSpeed offloads to a node's disk apart for each rank.

DeepSpeed names its files by the rank only: without a folder of its own, a run would read and
overwrite the weights and optimizer states of another run on the node. Nor does DeepSpeed remove the
files.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from pathlib import Path
from typing import Any

from hpcft.core.errors import DataError
from hpcft.core.paths import RunPaths
from hpcft.core.records import Cluster, Plan
from hpcft.scheduler import slurm_job
from hpcft.training.checkpointing.node_local import unique_name
from hpcft.training.distributed.rank_env import RankInfo

_PARTS = ("offload_optimizer", "offload_param")


def with_own_folder(
    plan: Plan, paths: RunPaths, cluster: Cluster, rank: RankInfo, restart_index: int
) -> Plan:
    """Returns a plan whose DeepSpeed configuration offloads to a new folder of this rank.

    It removes what earlier starts of the run have left on this node.

    Args:
        plan: the plan that runs.
        paths: the run's files.
        cluster: the run's profile.
        rank: this rank.
        restart_index: number of recoveries before this start.

    Raises:
        DataError: the folder cannot be made, or belongs to another user.
    """
    sections: dict[str, Any] = (plan.ds_config or {}).get("zero_optimization", {})
    parts = [part for part in _PARTS if sections.get(part, {}).get("device") == "nvme"]
    home = offload_home(paths, cluster, rank)
    if not parts or home is None:
        return plan
    start = home / f"{rank.job_id}-{slurm_job.restart_count()}-{restart_index}"
    folder = start / f"rank{rank.rank}"
    try:
        home.mkdir(mode=0o700, exist_ok=True)
        _check_owner(home)
        if rank.local_rank == 0:
            for other in set(home.iterdir()) - {start}:
                shutil.rmtree(other, ignore_errors=True)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{folder}: the folder for offloaded states cannot be made: {error.strerror}; correct "
            "node_disk_path in the profile, or set resources.offload_optimizer: cpu"
        ) from None
    own = {part: {**sections[part], "nvme_path": str(folder)} for part in parts}
    ds_config = {**(plan.ds_config or {}), "zero_optimization": {**sections, **own}}
    return plan.model_copy(update={"ds_config": ds_config})


def offload_home(paths: RunPaths, cluster: Cluster, rank: RankInfo) -> Path | None:
    """Returns the folder of a run's offloaded states on this node; None without a node's disk."""
    if cluster.node_disk_path is None:
        return None
    return Path(cluster.node_disk_path) / f"hpcft-nvme-{unique_name(paths, rank)}"


def remove_own_folders(paths: RunPaths, cluster: Cluster, rank: RankInfo) -> None:
    """Removes what a rank has offloaded to its node's disk; its worker has ended."""
    home = offload_home(paths, cluster, rank)
    if home is None or not home.is_dir():
        return
    for folder in home.glob(f"*/rank{rank.rank}"):
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # Other ranks of the node may still use theirs.
        for start in home.iterdir():
            start.rmdir()
        home.rmdir()


def _check_owner(home: Path) -> None:
    """Refuses a folder that another user has made: the states are weights of the model.

    Raises:
        DataError: the folder is not a private one of this user.
    """
    info = home.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise DataError(
            f"{home}: expected a folder that only you can use, for offloaded states; remove it, or "
            "ask its owner to"
        )
