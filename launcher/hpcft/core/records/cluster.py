"""Cluster: the hardware of a site, and how its Slurm wants it requested."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field
from pydantic.fields import FieldInfo

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
    """A GPU of a node."""

    name: SlurmWord
    """Model of the GPU, for people: `A100-80GB`."""
    type: SlurmWord | None = None
    """Slurm's GRES type (`--gres=gpu:a100:4`), if the site requires it."""
    memory_gib: Positive
    """Memory in GiB, as the driver reports it (a “16 GB” card has less than 16 GiB usable)."""
    compute_capability: Annotated[float, Field(ge=5, lt=20)]
    """CUDA compute capability; bfloat16 needs 8.0 (Ampere)."""
    peak_tflops: Positive | None = None
    """Dense 16-bit peak in TFLOP/s, from the data sheet; by default, the peak of a slow card of its
    generation."""
    link_gb_s: Positive | None = None
    """Bandwidth to the other GPUs of the node (NVLink), each way, in 10⁹ bytes per second, from the
    data sheet; by default, the GPUs communicate over PCIe."""
    host_link_gb_s: Positive | None = None
    """Bandwidth to the host's memory (PCIe), each way, in 10⁹ bytes per second; by default, that of
    16 PCIe lanes of its generation."""
    other_processes_gib: NonNegative = 0.0
    """Memory that processes of other users hold on it, in GiB; above 0 only on a shared GPU."""


class OomCaps(InputRecord):
    """Limits for a recipe, learned from earlier runs that ran out of memory."""

    per_device_train_batch_size: PositiveInt
    """Largest micro-batch that did not run out of memory."""
    gradient_checkpointing: bool
    """Whether activations have to be recomputed."""
    loss_chunks: PositiveInt = 1
    """Number of chunks in which the loss has to be computed."""
    nodes: PositiveInt = 1
    """Number of nodes that a run needed, after hpcft had resubmitted it with more."""


# Smallest and largest value that is accepted. CUDA contexts of 0.3 to 0.6 GiB have been measured,
# and processes of 0.65 GiB for tiny models; other recipes load more libraries. A value far beyond
# these bounds has another cause than the field's name says.
CALIBRATION_BOUNDS: Final = {
    "efficiency": (0.01, 0.9),
    "fragmentation": (0.02, 0.25),
    "context_bytes": (256 * 2**20, 2 * 2**30),
    "process_bytes": (2**29, 3 * 2**30),
}


def _bounded(field: str) -> FieldInfo:
    low, high = CALIBRATION_BOUNDS[field]
    bounded: FieldInfo = Field(ge=low, le=high)
    return bounded


class LearnedValue(InputRecord):
    """A value that runs of one kind have measured; it replaces the stated one for that kind."""

    field: Literal["efficiency", "context_bytes", "process_bytes"]
    """Field of the calibration that it replaces."""
    device: str
    """Name of the GPU; `cpu` without one."""
    precision: str = ""
    """Compute precision; empty where it does not matter."""
    layout: str = ""
    """Kind of layout; empty where it does not matter."""
    size: str = ""
    """Size class of the model; empty where it does not matter."""
    value: Positive
    """Median of what the runs have measured."""
    runs: list[str]
    """Runs that have measured it, as `recipe/run id`."""


class Calibration(InputRecord):
    """Values that hold on this cluster in the place of those that hpcft states."""

    efficiency: Annotated[float, _bounded("efficiency")] | None = None
    """Share of the peak FLOP/s that training reaches."""
    fragmentation: Annotated[float, _bounded("fragmentation")] | None = None
    """GPU memory that PyTorch's allocator reserves beyond its tensors, as a share of them."""
    context_bytes: Annotated[int, _bounded("context_bytes")] | None = None
    """GPU memory of a process besides the allocator's and the communicators', in bytes."""
    process_bytes: Annotated[int, _bounded("process_bytes")] | None = None
    """Memory of a rank on a CPU besides its tensors, in bytes."""
    learned: list[LearnedValue] = Field(default_factory=list)
    """Values that runs have measured, by GPU, kind of layout and size; `hpcft calibrate` writes
    them to the runs folder, and they come before the values above."""
    runs: Annotated[int, Field(ge=0)] = 0
    """Number of runs that have measured something."""
    notes: list[str] = Field(default_factory=list)
    """Measurements that were left out, and why."""
    oom_caps: dict[Name, OomCaps] = Field(
        default_factory=dict, validation_alias=renamed_from("lowered", "oom_caps")
    )
    """Out-of-memory limits, by recipe."""


class Cluster(InputRecord):
    """A cluster profile: everything about a site that recipes need not know."""

    name: Name
    """Name for `--cluster`: the file's name without suffix."""
    description: str = ""
    """One line of description."""
    scheduler: Literal["slurm", "local"]
    """`slurm` runs jobs with sbatch and srun, `local` as processes of this machine."""
    accelerator: Literal["cuda", "cpu"]
    """Device that ranks compute on. A test bed may schedule GPUs and still compute on the CPU."""
    partition: SlurmWord | None = None
    """Partition to submit to; by default `SBATCH_PARTITION`, else the site's default."""
    partitions: list[SlurmWord] = Field(default_factory=list)
    """Other partitions that a recipe may name."""
    account: SlurmWord | None = None
    """Account to charge; by default `SBATCH_ACCOUNT`, else your default account."""
    qos: SlurmWord | None = None
    """Quality of service; by default `SBATCH_QOS`, else your default one."""
    constraint: SlurmExpression | None = None
    """Node features, as in `sbatch --constraint`; by default `SBATCH_CONSTRAINT`."""
    gpu_request: Literal["gpus_per_node", "gres", "none"] = "gpus_per_node"
    """Option with which the site wants GPUs requested; `none` requests none."""
    max_nodes: PositiveInt = 1
    """Largest number of nodes of a job."""
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] = 0
    """Number of GPUs of a node; 0 on a CPU cluster."""
    gpu: Gpu | None = None
    """GPU of the nodes; required if `accelerator` is `cuda`."""
    cores_per_node: PositiveInt
    """Number of CPU cores of a node that a job may use."""
    host_memory_gib: Positive
    """Host memory of a node that a job may use, in GiB."""
    node_disk_path: AbsolutePath | None = None
    """Fast node-local folder (NVMe) for offloading, and for checkpoints, which are copied from it
    while training continues; by default, there is none."""
    node_disk_gib: NonNegative = 0.0
    """Space in `node_disk_path`, in GiB."""
    node_disk_gb_s: Positive | None = None
    """Bandwidth of `node_disk_path`, in 10⁹ bytes per second; 2 by default."""
    network_gb_s: Positive | None = None
    """Bandwidth of a node to the other nodes, over all adapters, each way, in 10⁹ bytes per second;
    by default 1.25, that of 10 Gbit Ethernet."""
    calibration: Calibration = Field(default_factory=Calibration)
    """Values that earlier runs have measured; `hpcft plan --uncalibrated` ignores them."""
    time_limit_min: PositiveInt = 1440
    """Longest time limit that the partition allows, in minutes."""
    setup: list[OneLine] = Field(default_factory=list)
    """Shell lines that the job runs before srun: load modules, activate an environment. They run
    unchanged, so write only lines that you trust."""
    python: CommandLine | None = None
    """Command that starts Python on a compute node (`apptainer exec --nv image.sif python`)."""
    stuck_after_min: Positive = 8.0
    """Shortest time without a training step after which a run counts as hanging, in minutes; slow
    steps get longer. Keep it below the 10 minutes after which NCCL and DeepSpeed end a waiting
    rank: then the stacks of all ranks show which rank hangs."""
    srun_args: list[OneLine] = Field(default_factory=list)
    """Further arguments of srun, for example `--container-image=…` of pyxis."""
    environment: dict[VariableName, OneLine] = Field(default_factory=dict)
    """Environment variables of the ranks."""
    master_address: Literal["node_addr", "hostname"] = "node_addr"
    """Address of rank 0 for the other ranks: Slurm's NodeAddr, or the machine's host name."""
