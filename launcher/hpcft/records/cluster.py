"""Cluster: what there is, and how the site wants it asked for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hpcft.records.base import (
    AbsolutePath,
    CommandLine,
    Name,
    NonNegative,
    OneLine,
    PositiveInt,
    Record,
    SlurmExpression,
    SlurmWord,
    VariableName,
)


class Gpu(Record):
    """One GPU of a node."""

    name: SlurmWord
    """Model, for people: `A100-80GB`."""
    type: SlurmWord | None = None
    """Slurm's GRES type (`--gres=gpu:a100:4`), where the site wants it named."""
    memory_gib: Annotated[float, Field(gt=0)]
    """Memory as the driver reports it, in GiB (a «16 GB» card has less than 16 GiB usable)."""
    compute_capability: Annotated[float, Field(ge=5, lt=20)]
    """CUDA compute capability; bfloat16 needs 8.0 (Ampere)."""
    peak_tflops: Annotated[float, Field(gt=0)] | None = None
    """Dense 16-bit peak in TFLOP/s from the data sheet."""


class Cluster(Record):
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
    """Partition to submit to; the site's default when absent."""
    partitions: list[SlurmWord] = Field(default_factory=list)
    """Partitions that a recipe may name instead, besides `partition`."""
    account: SlurmWord | None = None
    """Account to charge."""
    qos: SlurmWord | None = None
    """Quality of service."""
    constraint: SlurmExpression | None = None
    """Node features, as sbatch --constraint."""
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
    host_memory_gib: Annotated[float, Field(gt=0)]
    """Host memory of a node that a job may use, in GiB."""
    node_disk_path: AbsolutePath | None = None
    """Fast node-local folder (NVMe), for offloading; none when absent."""
    node_disk_gib: NonNegative = 0.0
    """Room in `node_disk_path`, in GiB."""
    time_limit_min: PositiveInt = 1440
    """Longest time limit that the partition allows."""
    setup: list[OneLine] = Field(default_factory=list)
    """Shell lines before srun: module load, source a venv, conda activate; trusted text."""
    python: CommandLine | None = None
    """Command that starts Python on a compute node (`apptainer exec --nv image.sif python`)."""
    srun_args: list[OneLine] = Field(default_factory=list)
    """More arguments of srun, for example pyxis' `--container-image=…`."""
    environment: dict[VariableName, OneLine] = Field(default_factory=dict)
    """Environment variables of the ranks."""
    master_address: Literal["node_addr", "hostname"] = "node_addr"
    """How rank 0 tells the others its address: Slurm's NodeAddr, or the machine's own host name."""
