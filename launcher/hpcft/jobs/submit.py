"""Submits prepared runs: finds earlier ones, and queues jobs for the others."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hpcft.config.cluster_profile import Profile
from hpcft.core import attempts, files
from hpcft.core.errors import InputError, Problem
from hpcft.core.paths import RunPaths
from hpcft.core.records import Attempt
from hpcft.core.run_index import read_run
from hpcft.jobs.earlier_run import find_earlier_runs, resume_if_saved
from hpcft.jobs.prepare import PreparedRun
from hpcft.jobs.run_folder import record_attempt, run_folder, write_run_folder
from hpcft.jobs.status import RunStatus
from hpcft.recovery.log import saved_step
from hpcft.scheduler import scheduler_of
from hpcft.scheduler.protocol import JobRequest, Refused, Scheduler, TooManyJobs


@dataclass(frozen=True, kw_only=True)
class SubmittedRun:
    """Outcome of submitting one run."""

    run_id: str
    """Identity by content."""
    folder: Path
    """The run folder."""
    outcome: Literal["submitted", "running", "completed", "not queued"]
    """Whether it was submitted now, was found, or could not be queued."""
    job_id: str
    """Id of its job; empty if it was not queued."""
    step: int = 0
    """Optimizer step that a submitted run resumes from; 0 for the beginning."""
    limit: str = ""
    """Slurm's name of the limit that kept it from being queued."""


def sweep_id(prepared: Sequence[PreparedRun]) -> str:
    """Returns the identity of a sweep: a hash of its run ids."""
    text = " ".join(sorted(run.run_id for run in prepared))
    return "sweep-" + hashlib.sha256(text.encode()).hexdigest()[:8]


def dry_run(site: Profile, prepared: list[PreparedRun], root: Path) -> dict[str, Any]:
    """Returns what would be submitted: recipes, plans, DeepSpeed configurations and scripts."""
    return {
        "cluster": site.cluster.model_dump(mode="json"),
        "runs": [
            {
                "run_id": run.run_id,
                "point": run.point.values,
                "recipe": run.point.recipe.model_dump(mode="json", exclude_none=True),
                "plan": run.plan.model_dump(mode="json", exclude={"ds_config"}),
                "ds_config": run.plan.ds_config,
            }
            for run in prepared
        ],
        "jobs": [
            {"runs": [run.run_id for run in group], "sbatch_script": script}
            for group, script in jobs_of(site, prepared, root)
        ],
    }


def jobs_of(
    site: Profile, prepared: list[PreparedRun], root: Path
) -> list[tuple[list[PreparedRun], str | None]]:
    """Returns the runs of each job that would be submitted, and its batch script if it has one."""
    files.check_path(root.absolute())
    submitter = _Submitter(site, root, prepared)
    return [(group, submitter.script(group)) for group in submitter.groups(prepared)]


def submit_runs(
    site: Profile,
    prepared: list[PreparedRun],
    root: Path,
    *,
    again: bool,
    known: Mapping[Path, RunStatus] | None = None,
) -> list[SubmittedRun]:
    """Submits the runs that are not there yet: as one job array, or as few as the scheduler takes.

    If the user may not have so many jobs queued, it submits the first ones; a later call submits
    the others.

    Args:
        site: the profile.
        prepared: the runs, from `prepare_runs`.
        root: the runs folder.
        again: whether to run completed runs once more.
        known: statuses that this command has just read, by run folder.

    Returns:
        The outcome of each run, in order.

    Raises:
        UsageError: it is not known what came of an earlier attempt.
        InputError: the scheduler refuses a job.
        ClusterError: the scheduler does not answer.
    """
    files.check_path(root.absolute())
    submitter = _Submitter(site, root, prepared)
    outcomes: dict[str, SubmittedRun] = {}
    remaining: list[PreparedRun] = []
    with files.lock_folder(root):
        found = find_earlier_runs(prepared, root, again=again, known=known)
        for run, earlier in zip(prepared, found, strict=True):
            if earlier is None:
                remaining.append(run if again else resume_if_saved(run, root))
            else:
                outcomes[run.run_id] = SubmittedRun(
                    run_id=run.run_id,
                    folder=run_folder(root, run),
                    outcome="running" if earlier.is_live else "completed",
                    job_id=earlier.job_id,
                )
        groups = submitter.groups(remaining)
        # All jobs are checked before the first one is queued.
        limits = [submitter.limit(group) for group in groups]
        for group, limit in zip(groups, limits, strict=True):
            outcomes |= {entry.run_id: entry for entry in submitter.submit_within(group, limit)}
    return [outcomes[run.run_id] for run in prepared]


class _Submitter:
    """Makes jobs of groups of runs, and submits them."""

    def __init__(self, site: Profile, root: Path, prepared: Sequence[PreparedRun]) -> None:
        self.site = site
        self.root = root
        self.scheduler: Scheduler = scheduler_of(site.cluster)
        self.sweep_id = sweep_id(prepared) if len(prepared) > 1 else None

    def groups(self, runs: Sequence[PreparedRun]) -> list[list[PreparedRun]]:
        """Groups runs that can share a job array: they need the same nodes, ranks and partition."""
        limit = (self.scheduler.max_array_size() if len(runs) > 1 else None) or len(runs)
        by_shape: dict[tuple[int, int, str | None], list[PreparedRun]] = {}
        for run in runs:
            layout = run.plan.layout
            shape = (layout.nodes, layout.ranks_per_node, run.plan.partition)
            by_shape.setdefault(shape, []).append(run)
        return [
            group[first : first + limit]
            for group in by_shape.values()
            for first in range(0, len(group), limit)
        ]

    def request(self, group: Sequence[PreparedRun]) -> JobRequest:
        """Returns the job of a group; a dry run and the submission after it make the same one."""
        folders = [run_folder(self.root, run) for run in group]
        first = folders[0]
        plan = group[0].plan.model_copy(
            update={
                "mem_mib": max(run.plan.mem_mib for run in group),
                "time_min": max(run.plan.time_min for run in group),
            }
        )
        name = group[0].run_id if len(group) == 1 else sweep_id(group)
        earlier = read_run(first)
        attempt_number = len(earlier.job.attempts) if earlier else 0
        return JobRequest(
            cluster=self.site.cluster,
            plan=plan,
            name=group[0].point.recipe.name,
            token=attempts.attempt_token(name, attempt_number, first),
            runs=folders,
            logs=RunPaths(first).logs if len(group) == 1 else first.parent / sweep_id(group),
        )

    def script(self, group: Sequence[PreparedRun]) -> str | None:
        """Returns the batch script of a group; None if the scheduler needs none."""
        return self.scheduler.script(self.request(group))

    def limit(self, group: Sequence[PreparedRun]) -> str:
        """Returns the limit that keeps a group from being queued now; empty if there is none.

        Raises:
            InputError: the scheduler would never take the job.
        """
        try:
            self.scheduler.check(self.request(group))
        except TooManyJobs as refused:
            return str(refused)
        except Refused as refused:
            raise self._input_error(refused) from None
        return ""

    def _input_error(self, refused: Refused) -> InputError:
        """Returns a refusal as an error that names the profile's line."""
        where = self.site.document.location_of(refused.key)
        what = f"Slurm refuses the job: {refused.reason}"
        return InputError([Problem(where, refused.key, what, refused.fix)])

    def submit_within(self, group: Sequence[PreparedRun], limit: str) -> list[SubmittedRun]:
        """Submits as many runs of a group, from the first one on, as the scheduler takes now.

        Args:
            group: runs of one job or job array.
            limit: limit that all of them together would exceed; empty if they exceed none.
        """
        fits, exceeds = (0, len(group)) if limit else (len(group), len(group) + 1)
        while fits + 1 < exceeds:
            half = (fits + exceeds) // 2
            fits, exceeds = (fits, half) if self.limit(group[:half]) else (half, exceeds)
        submitted: list[SubmittedRun] = []
        if fits:
            try:
                submitted = self._submit(group[:fits])
            except TooManyJobs as refused:  # The user has queued another job in the meantime.
                limit = str(refused)
        return submitted + [
            SubmittedRun(
                run_id=run.run_id,
                folder=run_folder(self.root, run),
                outcome="not queued",
                job_id="",
                limit=limit,
            )
            for run in group[len(submitted) :]
        ]

    def _submit(self, group: Sequence[PreparedRun]) -> list[SubmittedRun]:
        """Writes the run folders of a group, and submits its job.

        Raises:
            InputError: the scheduler refuses the job.
            TooManyJobs: the scheduler takes no more jobs now.
        """
        request = self.request(group)
        new_folders = {folder for folder in request.runs if not folder.exists()}
        planned = [
            attempts.new_attempt(
                request.token,
                request.logs,
                array_index=index if len(group) > 1 else None,
                slurm_cluster=self.scheduler.cluster_name(),
            )
            for index in range(len(group))
        ]

        def write(item: tuple[PreparedRun, Path, Attempt]) -> None:
            run, folder, attempt = item
            write_run_folder(self.site, run, folder)
            # With its token first: the job is found by it if this process is killed before it can
            # record the job id.
            record_attempt(self.site, run, folder, attempt=attempt, sweep_id=self.sweep_id)

        items = list(zip(group, request.runs, planned, strict=True))
        for parent in {folder.parent for folder in request.runs}:
            files.create_folder(parent)
        with files.synced_together():
            for item in items:
                if item[1] in new_folders:
                    write(item)
            # Files that replace others wait for the disk.
            files.for_each(write, [item for item in items if item[1] not in new_folders])
            files.create_folder(request.logs)
        try:
            submissions = self.scheduler.submit(request)
        except Refused as refused:
            for folder in new_folders:
                shutil.rmtree(folder, ignore_errors=True)
            if isinstance(refused, TooManyJobs):
                raise
            raise self._input_error(refused) from None
        queued = [
            attempt.model_copy(
                update={"job_id": given.job_id, "process_started": given.process_started}
            )
            for attempt, given in zip(planned, submissions, strict=True)
        ]

        def record(item: tuple[PreparedRun, Path, Attempt]) -> None:
            run, folder, attempt = item
            record_attempt(self.site, run, folder, attempt=attempt, sweep_id=self.sweep_id)

        files.for_each(record, list(zip(group, request.runs, queued, strict=True)))
        return [
            SubmittedRun(
                run_id=run.run_id,
                folder=folder,
                outcome="submitted",
                job_id=given.job_id,
                step=saved_step(RunPaths(folder)),
            )
            for run, folder, given in zip(group, request.runs, submissions, strict=True)
        ]
