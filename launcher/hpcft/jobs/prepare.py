"""Reads, checks and plans the runs of a recipe, before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from hpcft.config import cluster_profile, identity, recipe
from hpcft.config.cluster_profile import Profile
from hpcft.config.recipe_types import SweepPoint
from hpcft.config.sweep import format_point
from hpcft.core.errors import InputError, Problem
from hpcft.core.paths import RunPaths
from hpcft.core.records import Fingerprints, Plan, StagedInputs
from hpcft.jobs import default_cluster
from hpcft.planning.feasibility import plan_resolved, with_calibration
from hpcft.staging import hub_inputs, staged_inputs
from hpcft.staging.check_rows import check_rows


@dataclass(frozen=True)
class PreparedRun:
    """A run that is ready to be submitted: nothing is written yet."""

    point: SweepPoint
    plan: Plan
    run_id: str
    fingerprints: Fingerprints
    staged: StagedInputs
    on_resume: Callable[[RunPaths], None] | None = None
    """What makes the run folder ready to go on in; None: the run begins anew."""


def prepare_runs(
    recipe_name: str,
    cluster_name: str | None,
    overrides: list[str],
    *,
    calibrated_by: Path | None = None,
    dry: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Profile, list[PreparedRun]]:
    """Reads, checks and plans every run of a recipe; touches no run folder.

    Args:
        recipe_name: name or file of the recipe.
        cluster_name: name or file of the profile; None for the one that is here.
        overrides: `key=value` changes of the recipe.
        calibrated_by: runs folder whose measurements the plans go by; None for stated values.
        dry: whether nothing is going to be submitted: what has not been staged is only told.
        say: is told of progress.

    Raises:
        InputError: the recipe, the profile or the data is wrong, with all problems found.
        UsageError: the model or the data have not been staged.
        DoesNotFit: a run does not fit the cluster.
    """
    points = recipe.load_recipe(recipe_name, overrides)
    site = with_calibration(
        cluster_profile.load_profile(cluster_name or default_cluster.detect_cluster()),
        calibrated_by,
        say,
    )
    hub = staged_inputs.hub_folder(staged_inputs.environment(site.cluster))
    embedding_parameters = [staged_inputs.find_staged(point.recipe, hub) for point in points]
    if missing := [line for _, lines in embedding_parameters for line in lines]:
        refusal = staged_inputs.not_staged_error(missing, hub, recipe_name, cluster_name, overrides)
        if not dry:
            raise refusal
        say(f"not yet to be submitted: {refusal}")
    prepared = []
    checked: set[str] = set()
    for number, (point, (staged, lacks)) in enumerate(
        zip(points, embedding_parameters, strict=True), 1
    ):
        if len(points) > 1:
            say(f"planning {number} of {len(points)}: {format_point(point.values)}")
        there = hub_inputs.with_folders(point.recipe, staged)
        plan = plan_resolved(replace(point, recipe=there), site)
        data = there.task.model_dump_json() + there.evaluation.split
        if not lacks and data not in checked:
            checked.add(data)
            check_rows(there, fixed="task.data.path" in staged)
        prints = identity.compute_fingerprints(point.recipe) | hub_inputs.commits(staged)
        run_id = identity.compute_run_id(point.recipe, site.cluster.name, prints)
        inputs = StagedInputs(inputs=staged)
        prepared.append(PreparedRun(point, plan, run_id, Fingerprints(files=prints), inputs))
    ids = [p.run_id for p in prepared]
    if len(set(ids)) < len(ids):
        where = points[0].where(("sweep",))
        raise InputError(
            [Problem(where, "sweep", "two points are the same run", "vary the values")]
        )
    return site, prepared
