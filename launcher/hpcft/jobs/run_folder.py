"""Writes the folder of a run before its job is queued."""

from __future__ import annotations

import shutil
from pathlib import Path

from hpcft.config.cluster_profile import Profile
from hpcft.core import attempts, files
from hpcft.core.paths import RunPaths
from hpcft.core.records import Attempt, Job
from hpcft.core.run_index import read_run
from hpcft.jobs.prepare import PreparedRun
from hpcft.recovery.log import write_current_plan


def run_folder(root: Path, run: PreparedRun) -> Path:
    """Returns the folder of a run in a runs folder."""
    return root.absolute() / run.point.recipe.name / run.run_id


def write_run_folder(site: Profile, run: PreparedRun, folder: Path) -> None:
    """Writes everything that the job needs; archives what it must not find.

    Args:
        site: the profile.
        run: the run.
        folder: its folder; the one that it lies in is there.
    """
    is_new = not folder.exists()
    files.create_folder(folder)
    paths = RunPaths(folder)
    if run.on_resume:
        run.on_resume(paths)
    else:
        if not is_new:
            _archive_earlier_attempts(paths)
        write_current_plan(paths, run.plan, 0)
    files.write_record(paths.recipe, run.point.recipe)
    files.write_record(paths.cluster, site.cluster)
    files.write_record(paths.plan, run.plan)
    files.write_record(paths.fingerprints, run.fingerprints)
    files.write_record(paths.staged, run.staged)
    if run.plan.ds_config is not None:
        files.write_json(paths.ds_config, run.plan.ds_config)


def _archive_earlier_attempts(paths: RunPaths) -> None:
    """Moves the output of earlier attempts into `previous/<number>/`."""
    output = [paths.result, paths.progress, paths.metrics, paths.errors, paths.checkpoints,
              paths.answers, paths.recoveries, paths.stacks, paths.current_plan]  # fmt: skip
    earlier = read_run(paths.folder)
    if earlier and earlier.damage:
        output.append(paths.job)  # A new one is written, which knows the new attempts only.
    # Slurm and this machine may use a job id twice, and its rendezvous must not be found then.
    shutil.rmtree(paths.rendezvous, ignore_errors=True)
    attempts.archive(paths, output)


def record_attempt(
    site: Profile, run: PreparedRun, folder: Path, *, attempt: Attempt, sweep_id: str | None
) -> None:
    """Writes an attempt into job.json: first with its token, then again with its job id.

    Args:
        site: the profile.
        run: the run.
        folder: its folder.
        attempt: the attempt.
        sweep_id: sweep that the run is submitted with; None if it is submitted alone.
    """
    paths = RunPaths(folder)
    job = files.read_record_if_exists(paths.job, Job) or Job(
        run_id=run.run_id,
        recipe=run.point.recipe.name,
        cluster=site.cluster.name,
        scheduler=site.cluster.scheduler,
        point=run.point.values,
        sweep_id=sweep_id,
    )
    attempts.record_attempt(paths, job, attempt)
