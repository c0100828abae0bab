"""Rendezvous: rank 0 publishes its address and port, the other ranks wait for it."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

from hpcft.core.files import read_record, write_record
from hpcft.core.paths import RunPaths
from hpcft.core.records import Cluster, StoredRecord
from hpcft.scheduler import slurm
from hpcft.training.distributed.rank_env import RankInfo

# Rank 0 first prepares the data; its death ends the other ranks at once, so waiting costs little.
MEETING_TIMEOUT_S = 6 * 3600.0


# Rank 0's port is its own from before the others know it until the process ends.
_held: list[Any] = []


class Rendezvous(StoredRecord):
    """Where rank 0 listens."""

    address: str
    port: int


def rendezvous_file(paths: RunPaths, me: RankInfo, generation: int) -> Path:
    """Where the ranks of this attempt's start number `generation` find each other."""
    attempt = f"{me.job_id}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    return paths.rendezvous / f"{attempt}-{generation}.json"


def join_rendezvous(paths: RunPaths, cluster: Cluster, me: RankInfo, generation: int) -> None:
    """Rank 0, when it is ready, publishes its address and its port; the others wait for them."""
    file = rendezvous_file(paths, me, generation)
    if me.is_first:
        file.parent.mkdir(mode=0o700, exist_ok=True)
        write_record(file, Rendezvous(address=_address(cluster, me), port=_hold_port()))
    _wait_for(file)
    where = read_record(file, Rendezvous)
    os.environ["MASTER_ADDR"] = where.address
    os.environ["MASTER_PORT"] = str(where.port)


def _address(cluster: Cluster, me: RankInfo) -> str:
    if cluster.scheduler == "local":
        return "127.0.0.1"
    if cluster.master_address == "hostname":
        return socket.gethostname()
    return slurm.node_address(me.node)


def _hold_port() -> int:
    """A port that this process listens on from now on.

    A port that is only looked for may be taken by another before it is used. This is the store in
    which the ranks meet: torch, told of the port, joins the one that its process holds already.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    _held.append(
        TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, multi_tenant=True)
    )
    port: int = _held[-1].port
    return port


def _wait_for(file: Path) -> None:
    deadline = time.monotonic() + MEETING_TIMEOUT_S
    while not file.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank 0 was not ready within {MEETING_TIMEOUT_S:.0f} s ({file})")
        time.sleep(0.1)
        os.listdir(file.parent.parent)  # asks a network file system to look again
