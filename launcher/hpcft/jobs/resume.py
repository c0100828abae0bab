"""Prepares runs that have ended to resume from their last checkpoint.

Fields that decide the result may not change. The layout may: it is still the same run. A longer
training is another run, which starts from a copy of the first one's checkpoint.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from hpcft.config import identity
from hpcft.config.cluster_profile import Profile
from hpcft.config.recipe_types import FullRecipe
from hpcft.core.errors import UsageError
from hpcft.core.files import check_private, create_folder, read_record
from hpcft.core.paths import RunPaths
from hpcft.jobs.earlier_run import describe_damage
from hpcft.jobs.prepare import PreparedRun, prepare_runs
from hpcft.jobs.status import RunStatus
from hpcft.jobs.submit import SubmittedRun, submit_runs
from hpcft.recovery.log import record_resume
from hpcft.recovery.run import Run

LAYOUT_FIELDS = (
    "resources.",
    "train.per_device_train_batch_size",
    "train.gradient_checkpointing",
    "train.dataloader_num_workers",
    "train.logging_steps",
    "evaluation.per_device_eval_batch_size",
)
"""Fields that a resumed run may change: how it is laid out and watched. Sections end with a dot."""
LENGTH_FIELDS = ("train.num_train_epochs", "train.max_steps")
"""Fields that make another run, which starts from this one's checkpoint."""


def resume_runs(
    runs: Sequence[RunStatus],
    *,
    cluster_name: str | None,
    overrides: list[str],
    root: Path,
    say: Callable[[str], None] = lambda _: None,
) -> list[SubmittedRun]:
    """Resumes ended runs: as one job array for each cluster, or as few as the scheduler takes.

    Nothing is written before all of them are prepared. Arguments are those of `prepare_resume`.

    Returns:
        The outcome of each run, in order.

    Raises:
        UsageError: a run cannot be resumed, or not with these changes.
        InputError: a recipe or a profile is wrong, or the scheduler refuses a job.
        DoesNotFit: what is left of a run does not fit the cluster.
        ClusterError: the scheduler does not answer.
    """
    by_cluster: dict[str, tuple[Profile, list[tuple[int, PreparedRun]]]] = {}
    for index, run in enumerate(runs):
        site, prepared = prepare_resume(
            run, cluster_name=cluster_name, overrides=overrides, root=root, say=say
        )
        # Each run has its own copy of the profile that it was submitted with.
        _, group = by_cluster.setdefault(site.cluster.model_dump_json(), (site, []))
        group.append((index, prepared))
    known = {run.paths.folder.absolute(): run for run in runs}
    outcomes: dict[int, SubmittedRun] = {}
    for site, group in by_cluster.values():
        items = [prepared for _, prepared in group]
        submitted = submit_runs(site, items, root, again=False, known=known)
        outcomes |= {index: run for (index, _), run in zip(group, submitted, strict=True)}
    return [outcomes[index] for index in range(len(runs))]


def prepare_resume(
    run: RunStatus,
    *,
    cluster_name: str | None,
    overrides: list[str],
    root: Path,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Profile, PreparedRun]:
    """Reads and plans what is left of a run; writes nothing.

    Args:
        run: the run.
        cluster_name: name or file of the profile; None for the one that it was submitted with.
        overrides: `key=value` changes of its recipe.
        root: the runs folder.
        say: receives a sentence for each step.

    Raises:
        UsageError: the run cannot be resumed, or not with these changes.
        InputError: the recipe or the profile is wrong.
        DoesNotFit: what is left does not fit the cluster.
    """
    name = f"{run.job.recipe}/{run.job.run_id}"
    _check_ended(run, name)
    folder = Run.open(run.paths.folder)
    before = read_record(run.paths.recipe, FullRecipe)
    site, (prepared,) = prepare_runs(
        str(run.paths.recipe),
        cluster_name=cluster_name or str(run.paths.cluster),
        overrides=overrides,
        calibrated_by=root,
        say=say,
    )
    is_longer = _is_longer(name, before, prepared.point.recipe)
    if run.is_completed and not is_longer:
        raise UsageError(
            f"{name} is complete; train it longer, for example with -o {LENGTH_FIELDS[0]}=5"
        )
    step = folder.saved_step()
    if is_longer:
        return site, _as_longer_run(run, prepared, site, step)
    prepared = replace(prepared, run_id=run.job.run_id)
    if not overrides and cluster_name is None:
        # The layout in which it ended, after all of its fallbacks.
        prepared = replace(prepared, plan=folder.read_plan())
    plan = prepared.plan

    def on_resume(paths: RunPaths) -> None:
        record_resume(paths, plan, "a person resumed it")

    return site, replace(prepared, on_resume=on_resume)


def _check_ended(run: RunStatus, name: str) -> None:
    """Refuses a run that is alive, or whose state is not known.

    Raises:
        UsageError: the run is alive, or may be.
    """
    check_private(run.paths.folder)
    if run.is_live:
        raise UsageError(
            f"{name} is {run.state.lower()} as job {run.job_id}: it needs no resume until it ends"
        )
    if run.damage:
        raise UsageError(describe_damage(run))
    if run.state == "UNKNOWN":
        raise UsageError(
            f"{name}: its job may still be alive, but its state is not known ({run.note}); try "
            f"later, or cancel it: hpcft cancel {run.job.run_id}"
        )


def _as_longer_run(run: RunStatus, prepared: PreparedRun, site: Profile, step: int) -> PreparedRun:
    """Returns a longer training as another run, which starts from a checkpoint of this one.

    Args:
        run: the run that has the checkpoint.
        prepared: the longer training.
        site: the profile.
        step: optimizer step of the checkpoint; 0 if there is none.

    Raises:
        UsageError: there is no checkpoint.
    """
    if not step:
        raise UsageError(
            f"{run.job.recipe}/{run.job.run_id} has no checkpoint to resume from "
            "(train.save_strategy keeps some): submit the longer training as a run of its own"
        )
    origin = f"{run.job.run_id} at step {step}"
    run_id = identity.compute_run_id(
        prepared.point.recipe, site.cluster.name, prepared.fingerprints.files, origin
    )

    def on_resume(paths: RunPaths) -> None:
        _copy_checkpoint(run.paths, paths, step)
        record_resume(paths, prepared.plan, f"it continues run {origin}, a shorter training")

    return replace(prepared, run_id=run_id, on_resume=on_resume)


def _is_longer(name: str, before: FullRecipe, after: FullRecipe) -> bool:
    """Returns whether the changes make the training longer.

    Raises:
        UsageError: they change what is computed.
    """
    changed = _changed_fields(before.model_dump(mode="json"), after.model_dump(mode="json"))
    for key in changed:
        if not key.startswith(LAYOUT_FIELDS) and key not in LENGTH_FIELDS:
            allowed = ", ".join((*(key.rstrip(".") for key in LAYOUT_FIELDS), *LENGTH_FIELDS))
            raise UsageError(
                f"{name}: {key} cannot change when a run resumes, because the result would belong "
                f"to neither recipe; submit it as a new run (what can change: {allowed})"
            )
    return any(key in LENGTH_FIELDS for key in changed)


def _changed_fields(before: object, after: object, key: str = "") -> list[str]:
    """Returns the dotted fields in which two documents differ."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return [] if before == after else [key]
    names = [*before, *(name for name in after if name not in before)]
    return [
        field
        for name in names
        for field in _changed_fields(before.get(name), after.get(name), f"{key}.{name}".lstrip("."))
    ]


def _copy_checkpoint(source: RunPaths, target: RunPaths, step: int) -> None:
    """Copies a checkpoint and the metrics so far into the folder of another run."""
    create_folder(target.folder)
    create_folder(target.checkpoints)
    checkpoint = source.checkpoints / f"checkpoint-{step}"
    staging_dir = target.checkpoints / f".{checkpoint.name}.part"
    shutil.rmtree(staging_dir, ignore_errors=True)
    shutil.copytree(checkpoint, staging_dir, copy_function=_link)
    staging_dir.rename(target.checkpoints / checkpoint.name)
    shutil.copy2(source.metrics, target.metrics)


def _link(source: str, target: str) -> None:
    """Makes a hard link, or a copy if the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
