"""Cluster: what there is, and how the site wants it asked for."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field

from hpcft.core.records.base import (
    AbsolutePath,
    CommandLine,
    InputRecord,
    Name,
    NonNegative,
    OneLine,
    Positive,
    PositiveInt,
    SlurmExpression,
    SlurmWord,
    VariableName,
    renamed_from,
)


class Gpu(InputRecord):
    """One GPU of a node."""

    name: SlurmWord
    """Model, for people: `A100-80GB`."""
    type: SlurmWord | None = None
    """Slurm's GRES type (`--gres=gpu:a100:4`), where the site wants it named."""
    memory_gib: Positive
    """Memory as the driver reports it, in GiB (a «16 GB» card has less than 16 GiB usable)."""
    compute_capability: Annotated[float, Field(ge=5, lt=20)]
    """CUDA compute capability; bfloat16 needs 8.0 (Ampere)."""
    peak_tflops: Positive | None = None
    """Dense 16-bit peak in TFLOP/s from the data sheet; when absent, that of a slow card of its
    generation."""
    link_gb_s: Positive | None = None
    """Bandwidth to the other GPUs of the node (NVLink), each way, in 10⁹ bytes a second from the
    data sheet; when absent they talk over PCIe."""
    host_link_gb_s: Positive | None = None
    """Bandwidth to the host's memory (PCIe), each way, in 10⁹ bytes a second; when absent, 16
    lanes of what its generation has."""
    other_processes_gib: NonNegative = 0.0
    """Memory that processes of others hold on it, in GiB; more than 0 only on a shared GPU."""


class OomCaps(InputRecord):
    """What earlier runs of a recipe had to come down to when they were out of memory."""

    per_device_train_batch_size: PositiveInt
    """The largest micro-batch that is left after a lack of memory."""
    gradient_checkpointing: bool
    """Whether activations had to be recomputed."""
    loss_chunks: PositiveInt = 1
    """Parts in which the loss had to be computed."""
    nodes: PositiveInt = 1
    """Nodes that it took, where a run had to be queued anew."""


# What measurements may make of the stated values, least and most. Contexts of 0.3 to 0.6 GiB have
# been seen; processes of 0.65 GiB for tiny models, but other recipes load more libraries. What lies
# far beyond has another cause than its name says.
CALIBRATION_BOUNDS: Final = {
    "efficiency": (0.01, 0.9),
    "fragmentation": (0.02, 0.25),
    "context_bytes": (256 * 2**20, 2 * 2**30),
    "process_bytes": (2**30, 3 * 2**30),
}


def _bounded(field: str) -> Any:
    least, most = CALIBRATION_BOUNDS[field]
    return Field(ge=least, le=most)


class Calibration(InputRecord):
    """What runs of this cluster have measured, in the place of stated values."""

    efficiency: Annotated[float, _bounded("efficiency")] | None = None
    """Share of the peak FLOP/s that training reaches."""
    fragmentation: Annotated[float, _bounded("fragmentation")] | None = None
    """What the allocator of a GPU reserves beyond tensors, as a share of them."""
    context_bytes: Annotated[int, _bounded("context_bytes")] | None = None
    """What a process holds of a GPU beside what its allocator reserves and communicators."""
    process_bytes: Annotated[int, _bounded("process_bytes")] | None = None
    """What a rank on a CPU holds beside tensors."""
    runs: Annotated[int, Field(ge=0)] = 0
    """Runs that these values come from."""
    notes: list[str] = Field(default_factory=list)
    """Measurements beyond the bounds, of which the bound was taken."""
    oom_caps: dict[Name, OomCaps] = Field(
        default_factory=dict, validation_alias=renamed_from("lowered", "oom_caps")
    )
    """Recipe to what its runs had to come down to."""


class Cluster(InputRecord):
    """A cluster profile: everything about a site that no recipe should have to know."""

    name: Name
    """Name for `--cluster`; the file's name without suffix."""
    description: str = ""
    """A line for people."""
    scheduler: Literal["slurm", "local"]
    """`slurm` through sbatch and srun, `local` as processes of this machine."""
    accelerator: Literal["cuda", "cpu"]
    """What ranks compute on. A test bed may schedule GPUs and yet compute on the CPU."""
    partition: SlurmWord | None = None
    """Partition to submit to; when absent that of `SBATCH_PARTITION`, else the site's default."""
    partitions: list[SlurmWord] = Field(default_factory=list)
    """Partitions that a recipe may name instead, besides `partition`."""
    account: SlurmWord | None = None
    """Account to charge; when absent that of `SBATCH_ACCOUNT`, else your default."""
    qos: SlurmWord | None = None
    """Quality of service; when absent that of `SBATCH_QOS`, else your default."""
    constraint: SlurmExpression | None = None
    """Node features, as sbatch --constraint; when absent those of `SBATCH_CONSTRAINT`."""
    gpu_request: Literal["gpus_per_node", "gres", "none"] = "gpus_per_node"
    """How the site wants GPUs asked for."""
    max_nodes: PositiveInt = 1
    """Nodes that one job may take."""
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] = 0
    """GPUs of a node; 0 on a CPU cluster, where a rank is a process."""
    gpu: Gpu | None = None
    """The GPU; required where `accelerator` is cuda."""
    cores_per_node: PositiveInt
    """CPU cores of a node that a job may use."""
    host_memory_gib: Positive
    """Host memory of a node that a job may use, in GiB."""
    node_disk_path: AbsolutePath | None = None
    """Fast node-local folder (NVMe), for offloading, and for checkpoints, which are copied from it
    while training goes on; none when absent."""
    node_disk_gib: NonNegative = 0.0
    """Room in `node_disk_path`, in GiB."""
    node_disk_gb_s: Positive | None = None
    """Bandwidth of `node_disk_path`, in 10⁹ bytes a second; 2 when absent."""
    network_gb_s: Positive | None = None
    """Bandwidth of a node to the others, all adapters together, each way, in 10⁹ bytes a second;
    when absent 1.25, 10 Gbit Ethernet."""
    calibration: Calibration = Field(default_factory=Calibration)
    """What earlier runs have measured; `hpcft plan --uncalibrated` does without."""
    time_limit_min: PositiveInt = 1440
    """Longest time limit that the partition allows."""
    setup: list[OneLine] = Field(default_factory=list)
    """Shell lines before srun: module load, source a venv, conda activate; trusted text."""
    python: CommandLine | None = None
    """Command that starts Python on a compute node (`apptainer exec --nv image.sif python`)."""
    stuck_after_min: Positive = 8.0
    """Minutes without a training step after which a run counts as stuck, at least: steps that take
    long get longer. Less than the 10 after which NCCL and DeepSpeed end a rank that waits, so that
    the stacks of all ranks tell which one it waits for."""
    srun_args: list[OneLine] = Field(default_factory=list)
    """More arguments of srun, for example pyxis' `--container-image=…`."""
    environment: dict[VariableName, OneLine] = Field(default_factory=dict)
    """Environment variables of the ranks."""
    master_address: Literal["node_addr", "hostname"] = "node_addr"
    """How rank 0 tells the others its address: Slurm's NodeAddr, or the machine's own host name."""
