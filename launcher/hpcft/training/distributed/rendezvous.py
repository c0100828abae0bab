"""Rendezvous: rank 0 publishes its address and port, the other ranks wait for them."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

from hpcft.core.files import read_record, write_record
from hpcft.core.host import wait_until
from hpcft.core.paths import RunPaths
from hpcft.core.records import Cluster, StoredRecord
from hpcft.scheduler import slurm_job
from hpcft.training.distributed.rank_env import RankInfo

# Rank 0 prepares the data first, which may take hours. If it dies, the other ranks end at once.
RENDEZVOUS_TIMEOUT_S = 6 * 3600.0
_POLL_S = 0.1

# Rank 0's TCPStore holds the port until the process ends, so that no other process can take it.
_stores: list[Any] = []


class Rendezvous(StoredRecord):
    """Address of rank 0 in one start of a job."""

    address: str
    """Host name or IP address."""
    port: int
    """TCP port."""


def rendezvous_file(paths: RunPaths, rank: RankInfo, restart_index: int) -> Path:
    """Returns the file in which rank 0 publishes its address.

    Args:
        paths: the run's files.
        rank: any rank of the job.
        restart_index: number of recoveries before this start.
    """
    job_start = f"{rank.job_id}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    return paths.rendezvous / f"{job_start}-{restart_index}.json"


def join_rendezvous(paths: RunPaths, cluster: Cluster, rank: RankInfo, restart_index: int) -> None:
    """Publishes rank 0's address and port, or waits for them, and sets `MASTER_ADDR` and `_PORT`.

    Args:
        paths: the run's files.
        cluster: the run's profile.
        rank: this rank.
        restart_index: number of recoveries before this start.

    Raises:
        TimeoutError: rank 0 was not ready in time.
    """
    file = rendezvous_file(paths, rank, restart_index)
    if rank.is_first:
        file.parent.mkdir(mode=0o700, exist_ok=True)
        write_record(file, Rendezvous(address=_address(cluster, rank), port=_hold_port()))
    _wait_for(file)
    rendezvous = read_record(file, Rendezvous)
    os.environ["MASTER_ADDR"] = rendezvous.address
    os.environ["MASTER_PORT"] = str(rendezvous.port)


def _address(cluster: Cluster, rank: RankInfo) -> str:
    if cluster.scheduler == "local":
        return "127.0.0.1"
    if cluster.master_address == "hostname":
        return socket.gethostname()
    return slurm_job.node_address(rank.node)


def _hold_port() -> int:
    """Opens a TCPStore on a free port and returns the port.

    A free port that is only looked up may be taken before it is used. torch, given this port, joins
    the store that its process already holds (`multi_tenant`).
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    _stores.append(
        TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, multi_tenant=True)
    )
    port: int = _stores[-1].port
    return port


# `supervision.hang_diagnosis` knows this function by its name: a rank inside it waits for rank 0.
def _wait_for(file: Path) -> None:
    def is_published() -> bool:
        if file.exists():
            return True
        os.listdir(file.parent.parent)  # This makes a network file system ask its server again.
        return False

    if not wait_until(is_published, RENDEZVOUS_TIMEOUT_S, _POLL_S):
        raise TimeoutError(
            f"rank 0 has not published its address in {file} within {RENDEZVOUS_TIMEOUT_S:.0f} s; "
            "see its log"
        )
