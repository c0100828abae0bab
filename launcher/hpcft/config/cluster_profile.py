"""Loads cluster profiles (`slurm/<site>.yaml`) by name or path, and completes the local one."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from hpcft.config import validation, yaml_document
from hpcft.config.yaml_document import Document
from hpcft.core.errors import InputError, Problem, Problems, UsageError
from hpcft.core.host import visible_gpus
from hpcft.core.paths import is_in_run_folder, shipped_folder
from hpcft.core.records import Cluster, Gpu
from hpcft.core.units import GIB, parse_bytes


@dataclass(frozen=True)
class Profile:
    """A cluster and the document that describes it."""

    cluster: Cluster
    """The checked record."""
    document: Document
    """The YAML that it was read from, so that later errors can name a line."""


def list_profiles() -> list[Path]:
    """Returns the files of the shipped profiles, by name."""
    return sorted(shipped_folder("slurm").glob("*.yaml"), key=lambda path: path.stem)


def find_profile(name: str) -> Path:
    """Returns the file of a profile.

    Args:
        name: a path, or the name of `slurm/<name>.yaml` in this folder or of a shipped profile.

    Raises:
        InputError: there is none of that name.
    """
    given = Path(os.path.expanduser(name))
    # A run folder holds its profile as JSON, which is YAML too.
    if given.suffix in (".yaml", ".yml", ".json") and os.path.isfile(given):
        return given
    own = Path("slurm") / f"{name}.yaml"
    if os.path.isfile(own):
        return own
    by_name = {path.stem: path for path in list_profiles()}
    # `slurm/x.yaml` works outside the checkout too, where the wheel brings the profiles.
    if name in (given.stem, given.name, f"slurm/{given.name}") and given.stem in by_name:
        return by_name[given.stem]
    raise InputError([Problem(f"--cluster {name}", "", *_no_profile(given, list(by_name)))])


def _no_profile(given: Path, names: list[str]) -> tuple[str, str]:
    """Returns why a name is no profile, and what to do."""
    import difflib

    if os.path.isdir(given):
        return "is a folder, expected the file of a profile", "name the file in it"
    if os.path.isfile(given):
        return f"has the suffix {given.suffix!r}, expected .yaml", "rename the file"
    if os.path.exists(given):
        what = "is a pipe or a device, expected the file of a profile"
        return what, "write it to a file that ends in .yaml"
    near = difflib.get_close_matches(given.stem.lower()[:100], names, n=2)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    return "there is no such profile", (
        f"{meant}give the path of a YAML file, or one of {', '.join(names)}"
    )


def load_profile(name: str) -> Profile:
    """Loads and checks a profile.

    Args:
        name: a path, or a name as `find_profile` takes it.

    Raises:
        InputError: with all problems found, each with file and line.
    """
    file = find_profile(name)
    if is_in_run_folder(file):
        doc = yaml_document.stored_document(file, Cluster)
    else:
        doc = yaml_document.load_document(file)
    cluster = validation.validate(doc, Cluster)
    _check_across_fields(cluster, doc)
    if cluster.scheduler == "local":
        cluster = _with_local_hardware(cluster)
    return Profile(cluster, doc)


def _check_across_fields(cluster: Cluster, doc: Document) -> None:
    """Checks fields of a profile against each other.

    Raises:
        InputError: with all problems found.
    """
    problems = Problems(doc.location_of)
    gpu = cluster.gpu
    if cluster.accelerator == "cuda" and (gpu is None or cluster.gpus_per_node == 0):
        what = "cuda needs `gpu` and `gpus_per_node`"
        problems.add("accelerator", what, fix="add both, or set it to cpu")
    if gpu and gpu.other_processes_gib >= gpu.memory_gib:
        problems.add(
            "gpu.other_processes_gib",
            expected=f"less than the GPU's {gpu.memory_gib:g} GiB",
            got=f"{gpu.other_processes_gib:g}",
            fix="correct it or gpu.memory_gib",
        )
    if cluster.scheduler == "local" and cluster.max_nodes != 1:
        fix = "set it to 1, or scheduler to slurm"
        expected = "1, since this machine is one node"
        problems.add("max_nodes", expected=expected, got=cluster.max_nodes, fix=fix)
    problems.raise_if_any()


def with_gpu_memory(
    site: Profile, gpu_memory: str | None = None, other_processes: str | None = None
) -> Profile:
    """Returns the profile with another GPU memory, or with some of it used by other processes.

    Args:
        site: a profile with GPUs.
        gpu_memory: the GPU's memory as it stands on the command line, for example `14.74GiB`.
        other_processes: memory that processes of others hold, written in the same way.

    Raises:
        UsageError: the profile has no GPUs, a text is not a size, or others hold all the memory.
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
            raise UsageError(
                f"{option}: the cluster {site.cluster.name} has no GPUs; "
                "choose one that has with --cluster (`hpcft clusters` lists them)"
            )
        size = parse_bytes(text)
        if size is None or (size == 0 and field == "memory_gib"):
            raise UsageError(
                f"{option}: expected a size such as 14.74GiB, got {text!r}; correct it"
            )
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


def _with_local_hardware(cluster: Cluster) -> Cluster:
    """Returns the local profile with this machine's cores, memory and GPUs."""
    import psutil

    update: dict[str, object] = {
        "cores_per_node": len(os.sched_getaffinity(0)),
        "host_memory_gib": psutil.virtual_memory().total / GIB,
    }
    gpus = _local_gpus()
    if gpus:
        smallest = min(gpus, key=lambda gpu: gpu.memory_gib)
        update |= {"accelerator": "cuda", "gpus_per_node": len(gpus), "gpu": smallest}
    return cluster.model_copy(update=update)


def _local_gpus() -> list[Gpu]:
    """Returns the GPUs that nvidia-smi lists and this session may use, without importing torch."""
    import subprocess

    if shutil.which("nvidia-smi") is None:
        return []
    query = [
        "nvidia-smi",
        "--query-gpu=index,uuid,name,memory.total,compute_cap",
        "--format=csv,noheader,nounits",
    ]
    try:
        output = subprocess.run(
            query, capture_output=True, encoding="utf-8", timeout=20, check=True
        ).stdout
        rows = [
            [part.strip() for part in line.split(",")]
            for line in output.splitlines()
            if line.strip()
        ]
        # Others may use the GPUs that are not in CUDA_VISIBLE_DEVICES.
        visible = visible_gpus()
        entries = [index for index, *_ in rows] if visible is None else visible
        return [
            Gpu(
                name=re.sub(r"[^A-Za-z0-9_.:+-]+", "-", name).strip("-"),
                memory_gib=float(memory) / 1024,
                compute_capability=float(capability),
            )
            for entry in entries
            for index, uuid, name, memory, capability in rows
            if entry == index or (uuid.startswith(entry) and not entry.isdecimal())
        ]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []
