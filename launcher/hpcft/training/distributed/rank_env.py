"""Environment of a rank: its place among the ranks, and the variables that libraries read."""

from __future__ import annotations

import os
from dataclasses import dataclass

from hpcft.core.errors import UsageError
from hpcft.core.host import node_name
from hpcft.core.paths import cache_folder
from hpcft.core.records import Plan, RankError
from hpcft.core.torch_build import INSTALL_GUIDE, TorchBuild, why_no_kernels
from hpcft.training.distributed.torch_extensions import extensions_folder, path_with_own_ninja


@dataclass(frozen=True)
class RankInfo:
    """Place of this process among the ranks of its job."""

    rank: int
    """Global rank."""
    world_size: int
    """Number of ranks of the job."""
    local_rank: int
    """Rank among those of the same node."""
    node: str
    """Name of the node."""
    job_id: str
    """Id of the job."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes the records."""
        return self.rank == 0

    def error(self, kind: str, message: str, **more: str) -> RankError:
        """Returns an error record of this rank, with the current time.

        Args:
            kind: class of the exception, or a word for what ended the rank.
            message: text of the error.
            more: further fields of the record: phase, failure, next_step or traceback.
        """
        return RankError.now(self.rank, kind, message, node=self.node, job_id=self.job_id, **more)


def rank_info() -> RankInfo:
    """Reads this process's place among the ranks from the environment that its launcher set."""
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
    """Sets the environment of this rank; call it before torch or transformers are imported.

    Raises:
        RuntimeError: the job has another number of ranks than the plan.
    """
    rank = rank_info()
    expected = plan.layout.world_size
    if rank.world_size != expected:
        raise RuntimeError(f"the plan has {expected} ranks, but {rank.world_size} were started")
    _set_environment(rank, plan)
    return rank


def _set_environment(rank: RankInfo, plan: Plan) -> None:
    if single_process(plan):
        # If it saw several GPUs, the Trainer would split batches over them.
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
        # Compute nodes have no network, where a request to the hub hangs before it fails.
        HF_HUB_OFFLINE="1",
        HF_DATASETS_OFFLINE="1",
        HF_EVALUATE_OFFLINE="1",
        # The hub's cache may be read-only on compute nodes.
        HF_MODULES_CACHE=str(cache_folder() / "hf_modules"),
        TOKENIZERS_PARALLELISM="false",
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_DATASETS_DISABLE_PROGRESS_BARS="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(plan.cpus_per_task))
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions_folder())
    os.environ["PATH"] = path_with_own_ninja()
    if plan.accelerator == "cpu":
        os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        os.environ.pop(name, None)  # Jobs are offline: a token would be of no use, but may leak.


def check_gpu(plan: Plan) -> None:
    """Checks that this PyTorch has code for this rank's GPU, before anything is loaded.

    Raises:
        UsageError: it has none: the first kernel would fail, minutes from now.
    """
    if plan.accelerator != "cuda":
        return
    import torch

    if not torch.cuda.is_available():
        return  # Setting the device fails with the driver's reason.
    index = int(os.environ.get("LOCAL_RANK", "0"))
    major, minor = torch.cuda.get_device_capability(index)
    build = TorchBuild(version=torch.__version__, archs=torch.cuda.get_arch_list())
    name = torch.cuda.get_device_name(index)
    if why := why_no_kernels(build, name, major + minor / 10):
        raise UsageError(f"{why}; install another build in the job's environment; {INSTALL_GUIDE}")


def single_process(plan: Plan) -> bool:
    """Returns whether the run needs no process group: one rank, and no DeepSpeed.

    With a group of one rank the Trainer would wrap the model in DistributedDataParallel, whose
    buckets hold every gradient a second time.
    """
    return plan.layout.world_size == 1 and plan.ds_config is None


def init_process_group(plan: Plan) -> None:
    """Joins the process group, unless the run needs none or has joined it already.

    `from_pretrained` needs DeepSpeed's communication under ZeRO-3. On a CPU Accelerate does not set
    it up, and the model would be built without it.
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
