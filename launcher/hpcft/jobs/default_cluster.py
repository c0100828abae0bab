"""Chooses the cluster profile when `--cluster` is not given."""

from __future__ import annotations

import os

from hpcft.config.cluster_profile import find_profile
from hpcft.core.errors import InputError, Problem


def detect_cluster() -> str:
    """Name of the profile to use when none is given: a Slurm that is here and known, else `local`.

    A site's own profile is found by `HPCFT_CLUSTER` or, in the current folder, as
    `slurm/<ClusterName>.yaml`, where ClusterName is what Slurm calls itself.
    """
    if os.environ.get("HPCFT_CLUSTER"):
        return os.environ["HPCFT_CLUSTER"]
    from hpcft.scheduler import slurm

    name = slurm.cluster_name()
    if name is None:
        return "local"
    try:
        find_profile(name)
    except InputError:
        hint = f"copy a profile of similar shape to slurm/{name}.yaml and name it {name}"
        problem = Problem("--cluster", "", f"Slurm is here, but no profile slurm/{name}.yaml", hint)
        raise InputError([problem]) from None
    return name
