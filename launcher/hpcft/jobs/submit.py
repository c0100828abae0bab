"""Plan to Job: check all, find the earlier run, write the folder, then queue it."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hpcft.config.cluster_profile import Profile
from hpcft.core import attempts, files
from hpcft.core.errors import InputError, Problem, UsageError
from hpcft.core.paths import RunPaths
from hpcft.core.records import Attempt, Job
from hpcft.jobs.prepare import PreparedRun
from hpcft.jobs.status import run_status
from hpcft.recovery.log import record_resume, saved_step
from hpcft.scheduler import local, slurm
from hpcft.training.entry import start


@dataclass(frozen=True)
class SubmittedRun:
    """What became of one run of a submission."""

    run_id: str
    folder: Path
    outcome: Literal["submitted", "running", "completed", "not queued"]
    job_id: str
    step: int = 0
    """Of what goes on, the step that it goes on from."""
    limit: str = ""
    """Of what is not queued, Slurm's name of the limit that was reached."""


def sweep_id(prepared: list[PreparedRun]) -> str:
    """Identity of a sweep: of the runs that it is made of."""
    text = " ".join(sorted(item.run_id for item in prepared))
    return "sweep-" + hashlib.sha256(text.encode()).hexdigest()[:8]


def dry_run(site: Profile, prepared: list[PreparedRun], root: Path) -> dict[str, Any]:
    """Exactly what would be submitted: resolved recipe, plan, DeepSpeed configuration, script."""
    files.check_path(root.absolute())
    jobs = []
    for group in _groups(prepared, _array_size(site, prepared)):
        script = _script(site, group, root) if site.cluster.scheduler == "slurm" else None
        jobs.append({"runs": [item.run_id for item in group], "sbatch_script": script})
    return {
        "cluster": site.cluster.model_dump(mode="json"),
        "runs": [
            {
                "run_id": item.run_id,
                "point": item.point.values,
                "recipe": item.point.recipe.model_dump(mode="json", exclude_none=True),
                "plan": item.plan.model_dump(mode="json", exclude={"ds_config"}),
                "ds_config": item.plan.ds_config,
            }
            for item in prepared
        ],
        "jobs": jobs,
    }


def submit_runs(
    site: Profile, prepared: list[PreparedRun], root: Path, *, again: bool
) -> list[SubmittedRun]:
    """Submits what is not already there; a sweep as one job array, or as few as Slurm takes.

    Of more jobs than the user may have queued, as many are as fit; a later submission queues more.

    Args:
        site: the profile.
        prepared: from `prepare`.
        root: the runs folder.
        again: run a completed run once more instead of finding it.

    Returns:
        One entry for each run, in order.
    """
    files.check_path(root.absolute())
    is_slurm = site.cluster.scheduler == "slurm"
    done: dict[str, SubmittedRun] = {}
    fresh: list[PreparedRun] = []
    with files.lock_folder(root):
        for item in prepared:
            earlier = _earlier(item, root, again=again)
            if earlier:
                done[item.run_id] = earlier
            else:
                fresh.append(item if again else _going_on(item, root))
        groups = _groups(fresh, _array_size(site, fresh))
        limits = [_limit(site, group, root) if is_slurm else "" for group in groups]
        for group, limit in zip(groups, limits, strict=True):
            for entry in _submit_what_fits(site, group, limit, prepared, root):
                done[entry.run_id] = entry
    return [done[item.run_id] for item in prepared]


def _array_size(site: Profile, prepared: list[PreparedRun]) -> int | None:
    """The most runs of one job array; None for any number."""
    return (
        slurm.max_array_size() if site.cluster.scheduler == "slurm" and len(prepared) > 1 else None
    )


def _groups(prepared: list[PreparedRun], most: int | None) -> list[list[PreparedRun]]:
    """Runs that can share a job array: those that ask for the same nodes and ranks.

    Args:
        prepared: the runs.
        most: of one array; None for any number.
    """
    groups: dict[tuple[int, int, str | None], list[PreparedRun]] = {}
    for item in prepared:
        layout = item.plan.layout
        shape = (layout.nodes, layout.ranks_per_node, item.plan.partition)
        groups.setdefault(shape, []).append(item)
    return [
        group[first : first + (most or len(group))]
        for group in groups.values()
        for first in range(0, len(group), most or len(group))
    ]


def _run_folder(root: Path, item: PreparedRun) -> Path:
    return root.absolute() / item.point.recipe.name / item.run_id


def _submission_folder(root: Path, group: list[PreparedRun]) -> Path:
    first = _run_folder(root, group[0])
    return RunPaths(first).logs if len(group) == 1 else first.parent / sweep_id(group)


def _options(site: Profile, group: list[PreparedRun], token: str) -> dict[str, Any]:
    """Submitit's parameters; of an array, the most that any of its runs needs."""
    most = group[0].plan.model_copy(
        update={
            "mem_mib": max(item.plan.mem_mib for item in group),
            "time_min": max(item.plan.time_min for item in group),
        }
    )
    name = group[0].point.recipe.name
    return slurm.job_parameters(site.cluster, most, name, token)


def _token(group: list[PreparedRun], root: Path) -> str:
    """Names this attempt at these runs in this runs folder, the same for a dry run of it."""
    first = _run_folder(root, group[0])
    job = files.read_record_if_exists(RunPaths(first).job, Job)
    number = len(job.attempts) if job else 0
    name = group[0].run_id if len(group) == 1 else sweep_id(group)
    return attempts.attempt_token(name, number, first)


def _script(site: Profile, group: list[PreparedRun], root: Path) -> str:
    options = _options(site, group, _token(group, root))
    folder = _submission_folder(root, group)
    return slurm.sbatch_script(folder, options, site.cluster, len(group))


def _limit(site: Profile, group: list[PreparedRun], root: Path) -> str:
    """Name of the limit that keeps Slurm from queueing these runs now; empty where none does.

    Raises:
        InputError: Slurm would never take them.
    """
    try:
        slurm.check_script(_script(site, group, root))
    except slurm.TooManyJobs as refused:
        return str(refused)
    except slurm.Refused as refused:
        raise _input_error(site, refused) from None
    return ""


def _input_error(site: Profile, refused: slurm.Refused) -> InputError:
    """A refusal of Slurm's as an error that names the profile's line."""
    where = str(site.document.origin_of((refused.key,)))
    what = f"Slurm refuses the job: {refused.reason}"
    return InputError([Problem(where, refused.key, what, refused.fix)])


def _earlier(item: PreparedRun, root: Path, *, again: bool) -> SubmittedRun | None:
    """The earlier run of the same content, if it need not be submitted now."""
    folder = _run_folder(root, item)
    paths = RunPaths(folder)
    if not paths.job.exists():
        return None
    files.check_private(folder)
    job = files.read_record(paths.job, Job)
    view = run_status(paths, job, is_locked=lambda _: False)  # but by this command
    if view.job_id and job.attempts[-1].job_id is None:
        # The command that submitted it died between sbatch and its note: adopt the job.
        adopted = job.attempts[-1].model_copy(update={"job_id": view.job_id})
        attempts = [*job.attempts[:-1], adopted]
        files.write_record(paths.job, job.model_copy(update={"attempts": attempts}))
    if view.state in ("PENDING", "RUNNING"):
        return SubmittedRun(item.run_id, folder, "running", view.job_id)
    if view.state == "COMPLETED" and not again:
        return SubmittedRun(item.run_id, folder, "completed", view.job_id)
    if view.state == "UNKNOWN" and not view.unknown_to_slurm:
        raise UsageError(
            f"{item.run_id}: an earlier job of this run may still be alive, but its state is not "
            f"known ({view.note}); try later or cancel it: hpcft cancel {item.run_id}"
        )
    return None


def _going_on(item: PreparedRun, root: Path) -> PreparedRun:
    """The run, made to go on where an earlier attempt has saved something."""
    paths = RunPaths(_run_folder(root, item))
    if item.on_resume or paths.result.exists() or not saved_step(paths):
        return item
    said = "it was submitted again"
    return replace(item, on_resume=lambda there: record_resume(there, item.plan, said))


def _submit_what_fits(
    site: Profile, group: list[PreparedRun], limit: str, whole: list[PreparedRun], root: Path
) -> list[SubmittedRun]:
    """Submits as many of the runs, from the first on, as Slurm takes now.

    Args:
        site: the profile.
        group: runs of one job or job array.
        limit: that all of them together would exceed; empty where they would not.
        whole: all runs of the submission.
        root: the runs folder.
    """
    fit, over = (0, len(group)) if limit else (len(group), len(group) + 1)
    while fit + 1 < over:
        half = (fit + over) // 2
        fit, over = (fit, half) if _limit(site, group[:half], root) else (half, over)
    queued: list[SubmittedRun] = []
    if fit:
        try:
            queued = _submit_group(site, group[:fit], whole, root)
        except slurm.TooManyJobs as refused:  # of another job of the user's, just now
            limit = str(refused)
    return queued + [
        SubmittedRun(item.run_id, _run_folder(root, item), "not queued", "", limit=limit)
        for item in group[len(queued) :]
    ]


def _submit_group(
    site: Profile, group: list[PreparedRun], whole: list[PreparedRun], root: Path
) -> list[SubmittedRun]:
    token = _token(group, root)
    sweep = sweep_id(whole) if len(whole) > 1 else None
    is_slurm = site.cluster.scheduler == "slurm"
    shared_logs = _submission_folder(root, group)
    folders = [_run_folder(root, item) for item in group]
    logs = [shared_logs if is_slurm else RunPaths(folder).logs for folder in folders]
    indices = list(range(len(group))) if is_slurm and len(group) > 1 else [None] * len(group)
    new = [folder for folder in folders if not folder.exists()]
    for item, folder, log, index in zip(group, folders, logs, indices, strict=True):
        _write_folder(site, item, folder)
        files.create_folder(log)
        _note(site, item, folder, attempts.new_attempt(None, token, log, index), sweep)
    if is_slurm:
        options = _options(site, group, token)
        try:
            ids = slurm.submit(shared_logs, options, site.cluster, start, folders)
        except slurm.Refused as refused:
            for folder in new:
                shutil.rmtree(folder, ignore_errors=True)
            if isinstance(refused, slurm.TooManyJobs):
                raise
            raise _input_error(site, refused) from None
        started: list[float | None] = [None] * len(ids)
    else:
        begun = [
            local.submit(log, site.cluster, item.plan, start, folder)
            for item, folder, log in zip(group, folders, logs, strict=True)
        ]
        ids, started = [job_id for job_id, _ in begun], [time_s for _, time_s in begun]
    for item, folder, log, index, job_id, time_s in zip(
        group, folders, logs, indices, ids, started, strict=True
    ):
        made = attempts.new_attempt(job_id, token, log, index, time_s)
        _note(site, item, folder, made, sweep)
    return [
        SubmittedRun(item.run_id, folder, "submitted", job_id, saved_step(RunPaths(folder)))
        for item, folder, job_id in zip(group, folders, ids, strict=True)
    ]


def _write_folder(site: Profile, item: PreparedRun, folder: Path) -> None:
    """All that the job needs, written before it is queued; what it does not need is set aside."""
    files.create_folder(folder.parent)
    files.create_folder(folder)
    paths = RunPaths(folder)
    if item.on_resume:
        item.on_resume(paths)
    else:
        _set_aside(paths)
    files.write_record(paths.recipe, item.point.recipe)
    files.write_record(paths.cluster, site.cluster)
    files.write_record(paths.plan, item.plan)
    files.write_record(paths.fingerprints, item.fingerprints)
    files.write_record(paths.staged, item.staged)
    if item.plan.ds_config is not None:
        files.write_json(paths.ds_config, item.plan.ds_config)


def _set_aside(paths: RunPaths) -> None:
    """Moves what an earlier attempt wrote into `earlier/<number>/`, so that nothing is lost."""
    written = [paths.result, paths.progress, paths.metrics, paths.errors, paths.checkpoints,
               paths.answers, paths.recoveries, paths.stacks, paths.current_plan]  # fmt: skip
    shutil.rmtree(paths.rendezvous, ignore_errors=True)  # its job ids may come again
    attempts.archive(paths, written)


def _note(
    site: Profile, item: PreparedRun, folder: Path, attempt: Attempt, sweep: str | None
) -> None:
    """Writes the attempt into job.json: first with its token, then again with its job id."""
    paths = RunPaths(folder)
    job = files.read_record_if_exists(paths.job, Job) or Job(
        run_id=item.run_id,
        recipe=item.point.recipe.name,
        cluster=site.cluster.name,
        scheduler=site.cluster.scheduler,
        point=item.point.values,
        sweep_id=sweep,
    )
    attempts.record_attempt(paths, job, attempt)
