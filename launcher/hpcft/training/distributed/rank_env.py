"""Distributed start: who this rank is, where rank 0 listens, and the environment before imports."""

from __future__ import annotations

import os
from dataclasses import dataclass

from hpcft.core.host import node_name
from hpcft.core.paths import cache_folder
from hpcft.core.records import Plan, RankError
from hpcft.training.distributed.torch_extensions import extensions_folder


@dataclass(frozen=True)
class RankInfo:
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

    def error(self, kind: str, message: str, **more: str) -> RankError:
        """Returns an error of this rank, of this moment; `more` are further fields of the record.

        Args:
            kind: class of the exception, or another word for what ended the rank.
            message: its text.
            more: phase, failure, next_step or traceback.
        """
        return RankError.now(self.rank, kind, message, node=self.node, job_id=self.job_id, **more)


def rank_info() -> RankInfo:
    """This process among its peers, as its launcher tells it."""
    from submitit import JobEnvironment

    job = JobEnvironment()
    return RankInfo(
        rank=job.global_rank,
        world_size=job.num_tasks,
        local_rank=job.local_rank,
        node=node_name(),
        job_id=job.job_id,
    )


def init_rank_env(plan: Plan) -> RankInfo:
    """Sets the environment of this rank; call it before anything imports torch or transformers."""
    rank = rank_info()
    expected = plan.layout.world_size
    if rank.world_size != expected:
        raise RuntimeError(f"the plan has {expected} ranks, {rank.world_size} were started")
    _set_environment(rank, plan)
    return rank


def _set_environment(rank: RankInfo, plan: Plan) -> None:
    if single_process(plan):
        # Several GPUs that it sees would make the Trainer spread batches over them.
        first, *_ = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = first
    else:
        os.environ.update(
            RANK=str(rank.rank),
            WORLD_SIZE=str(rank.world_size),
            LOCAL_RANK=str(rank.local_rank),
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


def single_process(plan: Plan) -> bool:
    """Whether there is nobody to communicate with, and no DeepSpeed that wants to.

    Told of a group of one, the Trainer would wrap the model in DistributedDataParallel, whose
    buckets hold every gradient a second time.
    """
    return plan.layout.world_size == 1 and plan.ds_config is None


def init_process_group(plan: Plan) -> None:
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
    elif not (single_process(plan) or torch.distributed.is_initialized()):
        torch.distributed.init_process_group(backend)
