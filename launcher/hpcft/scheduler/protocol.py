"""Defines what hpcft asks of a scheduler: the protocol that Slurm and this machine implement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hpcft.core.errors import ClusterError
from hpcft.core.records import Attempt, Cluster, Plan
from hpcft.scheduler.job_state import JobState


class Refused(Exception):
    """The scheduler refuses a job, and would refuse it again."""

    def __init__(self, reason: str, *, requested: str, key: str = "name") -> None:
        """Describes a refusal.

        Args:
            reason: the scheduler's own words; the text of the exception.
            requested: what the job requested, in words.
            key: field of the cluster profile that is to blame.
        """
        super().__init__(reason)
        self.reason = f"{reason}; it requested {requested}"
        self.key = key
        self.fix = "correct the profile, or the recipe's resources"


class TooManyJobs(Refused):
    """The scheduler takes no more jobs of this user now; the text is the name of the limit."""


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """A job to submit; a job array if it is for several runs."""

    cluster: Cluster
    """Profile of the cluster."""
    plan: Plan
    """Layout, memory and time of the job; for an array the most that any of its runs needs."""
    name: str
    """Name of the job: that of the recipe."""
    token: str
    """Comment of the job, by which it is found again if its id was not recorded."""
    runs: Sequence[Path]
    """Run folders, one per element of the array."""
    logs: Path
    """Folder for the batch script, the list of runs, and logs."""
    exclude: Sequence[str] = ()
    """Nodes that the job must not use."""


@dataclass(frozen=True)
class Submission:
    """A job that was submitted for one run."""

    job_id: str
    """Slurm's id (`123`, `123_4` in an array) or the local controller's process id."""
    process_started: float | None = None
    """Unix time in seconds at which the local controller started."""


class Scheduler(Protocol):
    """Submits, finds and cancels jobs."""

    def cluster_name(self) -> str | None:
        """Returns Slurm's name of the cluster; None without Slurm, or if Slurm does not say."""

    def max_array_size(self) -> int | None:
        """Returns the most runs that one job may hold; None if there is no limit."""

    def script(self, request: JobRequest) -> str | None:
        """Returns the batch script of a request; None if the scheduler needs none."""

    def check(self, request: JobRequest) -> None:
        """Asks the scheduler whether it would take a job; submits nothing.

        Raises:
            Refused: it would never take the job.
            TooManyJobs: it would take the job, but not now.
            ClusterError: the scheduler does not answer.
        """

    def submit(self, request: JobRequest) -> list[Submission]:
        """Submits a job; returns one submission per run.

        Raises:
            Refused: the scheduler refuses the job.
            TooManyJobs: the scheduler takes no more jobs now.
            ClusterError: the scheduler failed, and may have queued the job or not.
        """

    def find_jobs(self, attempts: Sequence[Attempt]) -> list[str | None]:
        """Finds the jobs of attempts whose job id was not recorded, with one call for all.

        Returns:
            For each attempt its job id; None if the scheduler has no such job.

        Raises:
            ClusterError: the scheduler does not answer.
        """

    def states(self, attempts: Sequence[Attempt]) -> list[JobState]:
        """Returns the state of each attempt, with one call for all.

        An attempt without a job id was not queued. The state is UNKNOWN, with the reason, if the
        scheduler does not answer.
        """

    def cancel(self, attempts: Sequence[Attempt]) -> list[bool | ClusterError]:
        """Cancels the jobs of attempts that have a job id, with one call for all.

        Returns:
            For each attempt True if it was cancelled, False if it had ended, and the error if it is
            not known whether its job is alive, or if it can be cancelled elsewhere only.

        Raises:
            ClusterError: the scheduler failed to cancel the jobs.
        """
