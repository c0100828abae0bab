"""Submits, finds and cancels jobs: through Slurm, or as processes of this machine."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from hpcft.core.records import Cluster
    from hpcft.scheduler.protocol import Scheduler


def scheduler_of(cluster: Cluster) -> Scheduler:
    """Returns the scheduler of a cluster profile."""
    return scheduler_named(cluster.scheduler)


@functools.cache
def scheduler_named(name: Literal["slurm", "local"]) -> Scheduler:
    """Returns a scheduler by its name in profiles and job records.

    It is the same one for all of a command, so that Slurm is asked once for its configuration.
    """
    # Imported here: importing a module of this package must not import both schedulers.
    if name == "slurm":
        from hpcft.scheduler.slurm import Slurm

        return Slurm()
    from hpcft.scheduler.local import Local

    return Local()
