"""Distributed start: who this rank is, where rank 0 listens, and the environment before imports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcft.scheduler import slurm
from hpcft.core.paths import RunPaths, cache_folder
from hpcft.core.records import Cluster, Plan, Record
from hpcft.core.files import read, write

# Rank 0 first prepares the data; its death ends the other ranks at once, so waiting costs little.
MEETING_TIMEOUT_S = 6 * 3600.0
# Rank 0's port is its own from before the others know it until the process ends.
_held: list[Any] = []


class Rendezvous(Record):
    """Where rank 0 listens."""

    address: str
    port: int


@dataclass(frozen=True)
class Rank:
    """This process among its peers."""

    rank: int
    world_size: int
    local_rank: int
    node: str
    job_id: str

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes the records."""
        return self.rank == 0


def who_am_i() -> Rank:
    """This process among its peers, as its launcher tells it."""
    from submitit import JobEnvironment

    job = JobEnvironment()
    return Rank(
        rank=job.global_rank,
        world_size=job.num_tasks,
        local_rank=job.local_rank,
        node=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        job_id=job.job_id,
    )


def enter(plan: Plan) -> Rank:
    """Sets the environment of this rank; call it before anything imports torch or transformers."""
    me = who_am_i()
    expected = plan.layout.world_size
    if me.world_size != expected:
        raise RuntimeError(f"the plan has {expected} ranks, {me.world_size} were started")
    _set_environment(me, plan)
    return me


def _set_environment(me: Rank, plan: Plan) -> None:
    if is_alone(plan):
        # Several GPUs that it sees would make the Trainer spread batches over them.
        first, *_ = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = first
    else:
        os.environ.update(
            RANK=str(me.rank),
            WORLD_SIZE=str(me.world_size),
            LOCAL_RANK=str(me.local_rank),
            LOCAL_WORLD_SIZE=str(plan.layout.ranks_per_node),
        )
    os.environ.update(
        # Compute nodes have no network: without these each look-up hangs before it fails.
        HF_HUB_OFFLINE="1",
        HF_DATASETS_OFFLINE="1",
        HF_EVALUATE_OFFLINE="1",
        # The cache may be one that compute nodes can only read.
        HF_MODULES_CACHE=str(cache_folder() / "hf_modules"),
        TOKENIZERS_PARALLELISM="false",
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_DATASETS_DISABLE_PROGRESS_BARS="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(plan.cpus_per_task))
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions_folder())
    if plan.accelerator == "cpu":
        os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        os.environ.pop(name, None)  # jobs are offline; a token here could only leak


def is_alone(plan: Plan) -> bool:
    """Whether there is nobody to communicate with, and no DeepSpeed that wants to.

    Told of a group of one, the Trainer would wrap the model in DistributedDataParallel, whose
    buckets hold every gradient a second time.
    """
    return plan.layout.world_size == 1 and plan.ds_config is None


def communicate(plan: Plan) -> None:
    """Joins the ranks, unless they have been, or this one is alone.

    `from_pretrained` needs DeepSpeed's communication under ZeRO-3. Accelerate leaves it out on a
    CPU, and the model would be built before there are ranks.
    """
    import torch

    backend = "gloo" if plan.accelerator == "cpu" else "nccl"
    if plan.accelerator == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if plan.ds_config is not None:
        import deepspeed

        deepspeed.init_distributed(dist_backend=backend, verbose=False)
    elif not (is_alone(plan) or torch.distributed.is_initialized()):
        torch.distributed.init_process_group(backend)


def extensions_folder() -> Path:
    """Where DeepSpeed's compiled operators are kept: apart for each torch, Python and processor.

    And for each environment: its path is in the compiler's options, and two environments that
    shared a folder would compile each other's operators again at every start.
    """
    python = f"py{sys.version_info[0]}{sys.version_info[1]}"
    torch = importlib.metadata.version("torch")
    environment = f"{zlib.crc32(sys.prefix.encode()):08x}"
    name = f"{python}-torch{torch}-{platform.machine()}-{environment}"
    return cache_folder() / "torch_extensions" / name


def meeting(paths: RunPaths, me: Rank, generation: int) -> Path:
    """Where the ranks of this attempt's start number `generation` find each other."""
    attempt = f"{me.job_id}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    return paths.rendezvous / f"{attempt}-{generation}.json"


def meet(paths: RunPaths, cluster: Cluster, me: Rank, generation: int) -> None:
    """Rank 0, when it is ready, publishes its address and its port; the others wait for them."""
    file = meeting(paths, me, generation)
    if me.is_first:
        file.parent.mkdir(mode=0o700, exist_ok=True)
        write(file, Rendezvous(address=_address(cluster, me), port=_hold_port()))
    _wait_for(file)
    where = read(file, Rendezvous)
    os.environ["MASTER_ADDR"] = where.address
    os.environ["MASTER_PORT"] = str(where.port)


def _address(cluster: Cluster, me: Rank) -> str:
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
