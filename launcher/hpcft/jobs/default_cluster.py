"""Chooses the cluster profile when `--cluster` is not given."""

from __future__ import annotations

import os

from hpcft.config.cluster_profile import find_profile
from hpcft.core.errors import InputError, Problem


def detect_cluster() -> str:
    """Returns the name of this machine's cluster profile; `local` without Slurm.

    A site's own profile is named by `HPCFT_CLUSTER`, or is `slurm/<ClusterName>.yaml` in the
    current folder; ClusterName is Slurm's own name of the cluster.

    Raises:
        InputError: there is a Slurm, but no profile of its name.
        ClusterError: Slurm does not answer.
    """
    if os.environ.get("HPCFT_CLUSTER"):
        return os.environ["HPCFT_CLUSTER"]
    # Imported here: `--cluster` and HPCFT_CLUSTER need no Slurm.
    from hpcft.scheduler import slurm_commands

    name = slurm_commands.cluster_name()
    if name is None:
        return "local"
    try:
        find_profile(name)
    except InputError:
        what = f"this is the Slurm cluster {name}, but there is no profile slurm/{name}.yaml"
        fix = f"copy a profile of similar shape to slurm/{name}.yaml and name it {name}"
        problem = Problem("--cluster", "", what, fix)
        raise InputError([problem]) from None
    return name
