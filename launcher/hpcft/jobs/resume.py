"""A run that has ended goes on from its last checkpoint, because a person says so.

What decides its number may not change on the way. How it is laid out may: the same run goes on. A
longer training is another run, which begins with a copy of the first one's checkpoint.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hpcft.config import identity
from hpcft.config.cluster_profile import Profile
from hpcft.config.recipe_types import FullRecipe
from hpcft.core.errors import UsageError
from hpcft.core.files import check_private, create_folder, read_record
from hpcft.core.paths import RunPaths
from hpcft.core.records import Cluster
from hpcft.jobs.prepare import PreparedRun, prepare_runs
from hpcft.jobs.status import RunStatus
from hpcft.recovery import log

# How a run is laid out and watched; sections end with a dot.
LAYOUT_FIELDS = (
    "resources.",
    "train.per_device_train_batch_size",
    "train.gradient_checkpointing",
    "train.dataloader_num_workers",
    "train.logging_steps",
    "evaluation.per_device_eval_batch_size",
)
LENGTH_FIELDS = ("train.num_train_epochs", "train.max_steps")


def prepare_resume(
    view: RunStatus,
    cluster_name: str | None,
    overrides: list[str],
    root: Path,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Profile, PreparedRun]:
    """Reads and plans what is left of a run; writes nothing.

    Args:
        view: the run.
        cluster_name: name or file of the profile; None for the one that it was submitted with.
        overrides: `key=value` changes of its recipe.
        root: the runs folder.
        say: is told of progress.

    Raises:
        UsageError: it has nothing to go on with, or a change is none that it could go on with.
        InputError: the recipe or the profile is wrong.
        DoesNotFit: what is left does not fit.
    """
    paths = view.paths
    check_private(paths.folder)
    name = f"{view.job.recipe}/{view.job.run_id}"
    if view.is_live:
        raise UsageError(f"{name} is {view.state.lower()} as job {view.job_id}: it goes on anyway")
    if view.state == "UNKNOWN":
        raise UsageError(
            f"{name}: its job may still be alive, but its state is not known ({view.note}); try "
            f"later or cancel it: hpcft cancel {view.job.run_id}"
        )
    before = read_record(paths.recipe, FullRecipe)
    site, (item,) = prepare_runs(
        str(paths.recipe),
        cluster_name or str(paths.cluster),
        overrides,
        calibrated_by=root,
        say=say,
    )
    longer = _is_longer(name, before, item.point.recipe)
    if view.record is not None and not longer:
        raise UsageError(f"{name} is complete: give it more, for example -o {LENGTH_FIELDS[0]}=5")
    step = log.saved_step(paths)
    if longer:
        if not step:
            raise UsageError(
                f"{name} has no checkpoint to go on from (train.save_strategy keeps some): submit "
                "the longer training as a run of its own"
            )
        origin = f"{view.job.run_id} at step {step}"
        run_id = identity.compute_run_id(
            item.point.recipe, site.cluster.name, item.fingerprints.files, origin
        )
        said = f"goes on from run {origin}, whose training was to be shorter"
    else:
        run_id, said = view.job.run_id, "a person had it go on"
        if not overrides and cluster_name is None:
            # As it was laid out when it ended, with all that the ladder has changed.
            now = log.current_plan(paths, before, read_record(paths.cluster, Cluster))
            item = replace(item, plan=now)

    def on_resume(there: RunPaths) -> None:
        if longer:
            _copy(paths, there, step)
        log.record_resume(there, item.plan, said)

    return site, replace(item, run_id=run_id, on_resume=on_resume)


def _is_longer(name: str, before: FullRecipe, after: FullRecipe) -> bool:
    """Whether the changes make the training longer.

    Raises:
        UsageError: they change what is computed.
    """
    changed = _changed(before.model_dump(mode="json"), after.model_dump(mode="json"))
    for key in changed:
        if not key.startswith(LAYOUT_FIELDS) and key not in LENGTH_FIELDS:
            allowed = ", ".join((*(key.rstrip(".") for key in LAYOUT_FIELDS), *LENGTH_FIELDS))
            raise UsageError(
                f"{name}: {key} cannot change on the way, the number would be of neither recipe; "
                f"submit it as a new run (what can change: {allowed})"
            )
    return any(key in LENGTH_FIELDS for key in changed)


def _changed(one: object, other: object, key: str = "") -> list[str]:
    """Dotted fields that differ."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return [] if one == other else [key]
    names = [*one, *(name for name in other if name not in one)]
    return [
        found
        for name in names
        for found in _changed(one.get(name), other.get(name), f"{key}.{name}".lstrip("."))
    ]


def _copy(one: RunPaths, other: RunPaths, step: int) -> None:
    """The checkpoint and the metrics so far, for a run of its own."""
    create_folder(other.folder)
    create_folder(other.checkpoints)
    source = one.checkpoints / f"checkpoint-{step}"
    aside = other.checkpoints / f".{source.name}.part"
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(source, aside, copy_function=_link)
    aside.rename(other.checkpoints / source.name)
    shutil.copy2(one.metrics, other.metrics)


def _link(source: str, target: str) -> None:
    """A second name for a file, or where the file system has none, a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
