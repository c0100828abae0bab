"""Rates and features of the hardware, from the profile or by generation of GPU."""

from __future__ import annotations

from dataclasses import dataclass

from hpcft.core.records import Cluster, Precision, Train

GB = 1e9  # data sheets count bandwidth in 10⁹ bytes

# First compute capabilities that have a feature: Volta, then Ampere (NVIDIA, CUDA C++ Programming
# Guide, arithmetic throughput). PyTorch's flash attention needs Ampere too
# (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
TENSOR_CORE_CAPABILITY = 7.0
BF16_CAPABILITY = 8.0
FLASH_ATTENTION_CAPABILITY = 8.0

# Share of the peak FLOP/s that training reaches. Tuned stacks report 0.44 to 0.52 (Narayanan et al.
# 2021, arXiv:2104.04473, table 1) and 0.38 to 0.43 (Dubey et al. 2024, arXiv:2407.21783, table 4);
# transformers without fused layers stays below. A profile's calibration replaces it.
EFFICIENCY = 0.35
# Share of a link's nominal bandwidth that large transfers reach; framing takes the rest.
BANDWIDTH_SHARE = 0.75

# Dense 16-bit peak in TFLOP/s of a slow data-centre card of each generation, by the first compute
# capability that has it (data sheets: P4 without fast float16, P100-PCIe, V100-PCIe, T4, A30, L4,
# H100-PCIe, B200, RTX PRO).
PEAK_TFLOPS = ((12.0, 250.0), (10.0, 2250.0), (9.0, 756.0), (8.9, 121.0), (8.0, 125.0),
               (7.5, 65.0), (7.0, 112.0), (6.0, 18.7), (5.0, 5.0))  # fmt: skip
# Speed of fp32 relative to 16 bits, by whether there are tensor cores: T4 8.1 of 65, V100 15.7 of
# 125; A100 19.5 of 312 (data sheets). Without tensor cores 16 bits are twice as fast.
FP32_SHARE = {True: 1 / 8, False: 1 / 2}
# 16 lanes of PCIe 3, 4 and 5, by the first compute capability that has them (data sheets).
HOST_LINK_GB_S = ((9.0, 63.0), (8.0, 31.5), (0.0, 15.75))
NETWORK_GB_S = 1.25  # 10 Gbit Ethernet
NODE_DISK_GB_S = 2.0  # one NVMe disk of a server, writing
# A CPU socket with eight channels of DDR4-2933 has 188 GB/s; Adam, which reads and writes, reaches
# about half.
HOST_MEMORY_GB_S = 100.0
# fp32 FLOP/s of a core: 32 a cycle with AVX2 (two units of 8 multiply-adds) at 2 GHz.
CORE_GFLOPS = 64.0
LOOPBACK_GB_S = 4.0  # gloo between processes of a node


@dataclass(frozen=True)
class Rates:
    """FLOP/s of a rank, and bytes a second that large transfers reach."""

    flops: float
    """FLOP/s of a rank in the run's precision."""
    link: float
    """Bytes a second between the ranks of a node, per rank and direction."""
    network: float
    """Bytes a second between nodes, per node and direction."""
    host_link: float
    """Bytes a second between a GPU and the host, per rank and direction."""
    host_memory: float
    """Bytes a second of the host memory, per node."""
    disk: float
    """Bytes a second of the node-local disk, per node."""


def hardware_rates(
    cluster: Cluster,
    precision: Precision,
    ranks_per_node: int,
    *,
    efficiency: float | None = None,
) -> Rates:
    """Returns the rates that ranks on nodes of a cluster reach.

    Args:
        cluster: the profile.
        precision: compute precision.
        ranks_per_node: ranks that share a node's cores.
        efficiency: share of the peak FLOP/s; None for the stated one.
    """
    gpu = cluster.gpu
    if cluster.accelerator == "cuda" and gpu is not None:
        peak = 1e12 * (gpu.peak_tflops or _of_generation(PEAK_TFLOPS, gpu.compute_capability))
        if precision == "fp32":
            peak *= FP32_SHARE[has_capability(cluster, TENSOR_CORE_CAPABILITY)]
        host_link = gpu.host_link_gb_s or _of_generation(HOST_LINK_GB_S, gpu.compute_capability)
        link = gpu.link_gb_s or host_link
    else:
        peak = 1e9 * CORE_GFLOPS * max(1, cluster.cores_per_node // ranks_per_node)
        host_link = link = LOOPBACK_GB_S
    usable = BANDWIDTH_SHARE * GB
    return Rates(
        flops=(efficiency or stated_efficiency(cluster)) * peak,
        link=usable * link,
        network=usable * (cluster.network_gb_s or NETWORK_GB_S),
        host_link=usable * host_link,
        host_memory=GB * HOST_MEMORY_GB_S,
        disk=usable * (cluster.node_disk_gb_s or NODE_DISK_GB_S),
    )


def stated_efficiency(cluster: Cluster) -> float:
    """Returns the share of the peak FLOP/s that training is assumed to reach without runs."""
    return cluster.calibration.efficiency or EFFICIENCY


def has_capability(cluster: Cluster, least: float) -> bool:
    """Returns whether ranks compute on GPUs of at least this CUDA compute capability."""
    gpu = cluster.gpu
    return cluster.accelerator == "cuda" and gpu is not None and gpu.compute_capability >= least


def choose_precision(train: Train, cluster: Cluster) -> Precision:
    """Returns the compute precision: the recipe's, or the best one of the hardware.

    That is bf16 on GPUs that have it, fp16 on others, and fp32 on CPUs.
    """
    if train.bf16 is True:
        return "bf16"
    if train.fp16 is True:
        return "fp16"
    if cluster.accelerator == "cpu":
        return "fp32"
    if train.bf16 == "auto" and has_capability(cluster, BF16_CAPABILITY):
        return "bf16"
    return "fp32" if train.fp16 is False else "fp16"


def _of_generation(table: tuple[tuple[float, float], ...], capability: float) -> float:
    return next(value for first, value in table if capability >= first)
