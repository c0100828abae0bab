"""Cluster profiles: `slurm/<site>.yaml` to Cluster, by name or by path; and which one is here."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from hpcft.config import validation, yaml_document
from hpcft.config.yaml_document import Document
from hpcft.core.errors import InputError, Problem, UsageError
from hpcft.core.paths import is_in_run_folder, shipped
from hpcft.core.records import Cluster, Gpu
from hpcft.core.units import GIB, parse_bytes


@dataclass(frozen=True)
class Profile:
    """A profile and the text that it came from, for errors that name a line."""

    cluster: Cluster
    document: Document


def list_profiles() -> list[Path]:
    """The shipped profiles."""
    return sorted(shipped("slurm").glob("*.yaml"), key=lambda path: path.stem)


def find_profile(name: str) -> Path:
    """The file of a profile: a path, `slurm/<name>.yaml` in this folder, or a shipped one."""
    given = Path(os.path.expanduser(name))
    # JSON: that of a run folder; it is YAML, too.
    if given.suffix in (".yaml", ".yml", ".json") and os.path.isfile(given):
        return given
    own = Path("slurm") / f"{name}.yaml"
    if os.path.isfile(own):
        return own
    by_name = {path.stem: path for path in list_profiles()}
    # `slurm/x.yaml` works outside the checkout too, where the wheel brings the profiles.
    if name in (given.stem, given.name, f"slurm/{given.name}") and given.stem in by_name:
        return by_name[given.stem]
    problem = Problem(
        f"--cluster {name}", "", "there is no such profile", f"known: {', '.join(by_name)}"
    )
    raise InputError([problem])


def load_profile(name: str) -> Profile:
    """The profile of that name or path.

    Raises:
        InputError: with all problems found.
    """
    file = find_profile(name)
    is_stored = is_in_run_folder(file)
    doc = (
        yaml_document.stored_document(file, Cluster)
        if is_stored
        else yaml_document.load_document(file)
    )
    cluster = validation.validate(doc, Cluster)
    problems = []
    if cluster.accelerator == "cuda" and (cluster.gpu is None or cluster.gpus_per_node == 0):
        where = str(doc.origin_of(("accelerator",)))
        problems.append(
            Problem(where, "gpu", "a cuda cluster needs `gpu` and `gpus_per_node`", "add both")
        )
    if cluster.gpu and cluster.gpu.other_processes_gib >= cluster.gpu.memory_gib:
        where = str(doc.origin_of(("gpu", "other_processes_gib")))
        held, all_ = cluster.gpu.other_processes_gib, cluster.gpu.memory_gib
        what = f"expected less than the GPU's {all_:g} GiB, got {held:g}"
        problems.append(Problem(where, "gpu.other_processes_gib", what, "correct one of them"))
    if cluster.scheduler == "local" and cluster.max_nodes != 1:
        where = str(doc.origin_of(("max_nodes",)))
        problems.append(Problem(where, "max_nodes", "local is one node", "set it to 1"))
    if problems:
        raise InputError(problems)
    if cluster.scheduler == "local":
        cluster = _this_machine(cluster)
    return Profile(cluster, doc)


def with_gpu_memory(
    site: Profile, gpu_memory: str | None = None, other_processes: str | None = None
) -> Profile:
    """The profile with another GPU memory, or with some of it held by processes of others.

    Args:
        site: a profile with GPUs.
        gpu_memory: the GPU's memory as it was written, for example `14.74GiB`.
        other_processes: what others hold, likewise.

    Raises:
        UsageError: a size is none, or the two do not go together.
    """
    gpu = site.cluster.gpu
    update: dict[str, float] = {}
    for option, text, field in (
        ("--gpu-memory", gpu_memory, "memory_gib"),
        ("--other-processes", other_processes, "other_processes_gib"),
    ):
        if text is None:
            continue
        if gpu is None or site.cluster.accelerator == "cpu":
            raise UsageError(f"{option}: {site.cluster.name} has no GPUs; use --cluster")
        size = parse_bytes(text)
        if size is None or (size == 0 and field == "memory_gib"):
            raise UsageError(f"{option}: expected a size such as 14.74GiB, got {text!r}")
        update[field] = size / GIB
    if gpu is None or not update:
        return site
    changed = gpu.model_copy(update=update)
    if changed.other_processes_gib >= changed.memory_gib:
        raise UsageError(
            f"--other-processes: expected less than the {changed.memory_gib:g} GiB of a "
            f"{changed.name}, got {changed.other_processes_gib:g} GiB; correct it or --gpu-memory"
        )
    return replace(site, cluster=site.cluster.model_copy(update={"gpu": changed}))


def _this_machine(cluster: Cluster) -> Cluster:
    """The local profile with this machine's own cores and memory, and its GPUs if it has some."""
    import psutil

    update: dict[str, object] = {
        "cores_per_node": len(os.sched_getaffinity(0)),
        "host_memory_gib": psutil.virtual_memory().total / 2**30,
    }
    gpus = _local_gpus()
    if gpus:
        update |= {"accelerator": "cuda", "gpus_per_node": len(gpus), "gpu": gpus[0]}
    return cluster.model_copy(update=update)


def _local_gpus() -> list[Gpu]:
    """The GPUs of this machine as nvidia-smi tells them, without importing torch."""
    import subprocess

    if shutil.which("nvidia-smi") is None:
        return []
    query = [
        "nvidia-smi",
        "--query-gpu=name,memory.total,compute_cap",
        "--format=csv,noheader,nounits",
    ]
    try:
        output = subprocess.run(
            query, capture_output=True, text=True, timeout=20, check=True
        ).stdout
        rows = [line.split(",") for line in output.splitlines() if line.strip()]
        return [
            Gpu(
                name=re.sub(r"[^A-Za-z0-9_.:+-]+", "-", name.strip()).strip("-"),
                memory_gib=float(memory) / 1024,
                compute_capability=float(capability),
            )
            for name, memory, capability in rows
        ]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []
