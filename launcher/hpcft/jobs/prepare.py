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
from hpcft.jobs.equal_plans import EqualPlans
from hpcft.jobs.sampled_lengths import sample_lengths
from hpcft.planning.feasibility import plan_resolved, with_calibration
from hpcft.staging import hub_inputs, staged_inputs
from hpcft.staging.check_choices import tokenizer_state
from hpcft.staging.check_rows import RowsChecked, check_rows


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A run that is ready to be submitted; nothing is written yet."""

    point: SweepPoint
    """The recipe with this run's values of the swept fields."""
    plan: Plan
    """Layout and predictions."""
    run_id: str
    """Identity by content."""
    fingerprints: Fingerprints
    """Hashes of the run's inputs."""
    staged: StagedInputs
    """Inputs that the run reads from the cache instead of the hub."""
    on_resume: Callable[[RunPaths], None] | None = None
    """Prepares the run folder to resume from a checkpoint; None: the run starts from the
    beginning."""


def prepare_runs(
    recipe_name: str,
    *,
    cluster_name: str | None,
    overrides: list[str],
    calibrated_by: Path | None = None,
    dry_run: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Profile, list[PreparedRun]]:
    """Reads, checks and plans every run of a recipe; touches no run folder.

    Args:
        recipe_name: name or file of the recipe.
        cluster_name: name or file of the profile; None for that of this machine.
        overrides: `key=value` changes of the recipe.
        calibrated_by: runs folder whose measurements the plans use; None for stated values only.
        dry_run: whether nothing will be submitted: then inputs that have not been staged are only
            reported.
        say: receives a sentence for each step.

    Raises:
        InputError: the recipe, the profile or the data is wrong; lists all problems.
        UsageError: the model or the data have not been staged.
        DoesNotFit: a run does not fit the cluster.
    """
    points = recipe.load_recipe(recipe_name, overrides)
    site = with_calibration(
        cluster_profile.load_profile(cluster_name or default_cluster.detect_cluster()),
        calibrated_by,
        say,
    )
    hub = staged_inputs.hub_cache_folder(staged_inputs.job_environment(site.cluster))
    inputs = [staged_inputs.find_staged(point.recipe, hub) for point in points]
    if missing := [line for _, lines in inputs for line in lines]:
        error = staged_inputs.not_staged_error(
            missing, hub, recipe=recipe_name, cluster=cluster_name, overrides=overrides
        )
        if not dry_run:
            raise error
        say(f"this cannot be submitted yet: {error}")
    prepared = []
    plans = EqualPlans()
    checked_data: dict[str, RowsChecked] = {}
    for number, (point, (staged, not_staged)) in enumerate(zip(points, inputs, strict=True), 1):
        resolved = hub_inputs.with_folders(point.recipe, staged)
        resolved_point = replace(point, recipe=resolved)
        plan = plans.find(resolved_point)
        if plan is None:
            if len(points) > 1:
                say(f"planning {number} of {len(points)}: {format_point(point.values)}")
            lengths = None
            if not not_staged:
                lengths = sample_lengths(resolved, fixed="task.data.path" in staged)
            plan = plan_resolved(resolved_point, site, lengths=lengths)
            plan = plans.add(resolved_point, plan)
        data = resolved.task.model_dump_json() + resolved.evaluation.split + resolved.mode
        data += str(tokenizer_state(resolved))
        if not not_staged:
            if data not in checked_data:
                checked_data[data] = check_rows(resolved, fixed="task.data.path" in staged)
            plan = checked_data[data].added_to(plan)
        fingerprints = identity.compute_fingerprints(point.recipe)
        fingerprints |= hub_inputs.staged_commits(staged)
        prepared.append(
            PreparedRun(
                point=point,
                plan=plan,
                run_id=identity.compute_run_id(point.recipe, site.cluster.name, fingerprints),
                fingerprints=Fingerprints(files=fingerprints, are_whole=True),
                staged=StagedInputs(inputs=staged),
            )
        )
    run_ids = [run.run_id for run in prepared]
    if len(set(run_ids)) < len(run_ids):
        where = points[0].location_of("sweep")
        problem = Problem(where, "sweep", "two points are the same run", "make their values differ")
        raise InputError([problem])
    return site, prepared
