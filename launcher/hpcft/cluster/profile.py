"""Cluster profiles: `slurm/<site>.yaml` to Cluster, by name or by path; and which one is here."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from hpcft import document, validation
from hpcft.document import Document
from hpcft.errors import InputError, Problem
from hpcft.paths import shipped
from hpcft.records import Cluster, Gpu


@dataclass(frozen=True)
class Profile:
    """A profile and the text that it came from, for errors that name a line."""

    cluster: Cluster
    document: Document


def available() -> list[Path]:
    """The shipped profiles."""
    return sorted(shipped("slurm").glob("*.yaml"))


def find(name: str) -> Path:
    """The file of a profile: a path, `slurm/<name>.yaml` in this folder, or a shipped one."""
    given = Path(os.path.expanduser(name))
    if given.suffix in (".yaml", ".yml") and os.path.isfile(given):
        return given
    own = Path("slurm") / f"{name}.yaml"
    if os.path.isfile(own):
        return own
    by_name = {path.stem: path for path in available()}
    # `slurm/x.yaml` works outside the checkout too, where the wheel brings the profiles.
    if name in (given.stem, given.name, f"slurm/{given.name}") and given.stem in by_name:
        return by_name[given.stem]
    problem = Problem(
        f"--cluster {name}", "", "there is no such profile", f"known: {', '.join(by_name)}"
    )
    raise InputError([problem])


def load(name: str) -> Profile:
    """The profile of that name or path.

    Raises:
        InputError: with all problems found.
    """
    doc = document.load(find(name))
    cluster = validation.validate(doc, Cluster)
    problems = []
    if cluster.accelerator == "cuda" and (cluster.gpu is None or cluster.gpus_per_node == 0):
        where = str(doc.origin_of(("accelerator",)))
        problems.append(
            Problem(where, "gpu", "a cuda cluster needs `gpu` and `gpus_per_node`", "add both")
        )
    if cluster.scheduler == "local" and cluster.max_nodes != 1:
        where = str(doc.origin_of(("max_nodes",)))
        problems.append(Problem(where, "max_nodes", "local is one node", "set it to 1"))
    if problems:
        raise InputError(problems)
    if cluster.scheduler == "local":
        cluster = _this_machine(cluster)
    return Profile(cluster, doc)


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


def detect() -> str:
    """Name of the profile to use when none is given: a Slurm that is here and known, else `local`.

    A site's own profile is found by `HPCFT_CLUSTER` or, in the current folder, as
    `slurm/<ClusterName>.yaml`, where ClusterName is what Slurm calls itself.
    """
    if os.environ.get("HPCFT_CLUSTER"):
        return os.environ["HPCFT_CLUSTER"]
    from hpcft.cluster import slurm

    name = slurm.cluster_name()
    if name is None:
        return "local"
    try:
        find(name)
    except InputError:
        hint = f"copy a profile of similar shape to slurm/{name}.yaml and name it {name}"
        problem = Problem("--cluster", "", f"Slurm is here, but no profile slurm/{name}.yaml", hint)
        raise InputError([problem]) from None
    return name
