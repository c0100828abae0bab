"""Plans one run on one cluster, with all checks before it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hpcft.config import hf_model
from hpcft.config.cluster_profile import Profile
from hpcft.config.recipe_types import FullRecipe, SweepPoint
from hpcft.core import files
from hpcft.core.errors import DataError, InputError, Problem, StoreError
from hpcft.core.paths import calibration_file
from hpcft.core.records import Calibration, EvaluatedLayout, ModelFacts, Plan
from hpcft.planning import calibration, model_facts, planner
from hpcft.planning.core_speed import core_speed
from hpcft.planning.dataset_size import count_examples
from hpcft.planning.inputs import PlanInputs
from hpcft.planning.resource_checks import check_overflow, check_resources
from hpcft.planning.row_lengths import RowLengths


def with_calibration(site: Profile, runs: Path | None, warn: Callable[[str], None]) -> Profile:
    """Returns the profile with the measurements of the runs in a runs folder.

    Args:
        site: the profile.
        runs: the runs folder, which may be missing; None for a plan without any measurement, those
            in the profile included.
        warn: receives a sentence where the calibration cannot be read and is left out.
    """
    known = site.cluster.calibration if runs else Calibration()
    file = calibration_file(runs, site.cluster.name) if runs else None
    if file and os.path.isfile(file):
        try:
            files.check_private(file.parent)
            known = calibration.override(known, files.read_record(file, Calibration))
        except StoreError as error:
            warn(f"{error}; planned without it, `hpcft calibrate` writes it again")
    return replace(site, cluster=site.cluster.model_copy(update={"calibration": known}))


def plan_resolved(
    point: SweepPoint,
    site: Profile,
    *,
    brief: bool = False,
    lengths: RowLengths | None = None,
) -> Plan:
    """Returns the plan of one run whose inputs are resolved.

    Args:
        point: the run.
        site: the profile of the cluster.
        brief: whether the error leaves out the smallest change that would fit.
        lengths: lengths of the rows, where these are at hand.

    Raises:
        InputError: the run asks for what the cluster or the model does not have.
        DoesNotFit: no layout fits.
    """
    inputs = _checked_inputs(point, site)
    examples = count_examples(point.recipe.task.data)
    plan = planner.make_plan(replace(inputs, examples=examples, lengths=lengths), brief=brief)
    check_overflow(inputs, point.location_of)
    return plan


def evaluate_layouts(
    point: SweepPoint, site: Profile, lengths: RowLengths | None = None
) -> list[EvaluatedLayout]:
    """Returns every layout that recipe and profile allow, the cheapest first.

    Args:
        point: the run.
        site: the profile of the cluster.
        lengths: lengths of the rows, where these are at hand.

    Raises:
        InputError: the run asks for what the cluster or the model does not have.
    """
    return planner.evaluate_all(replace(_checked_inputs(point, site), lengths=lengths))


def _checked_inputs(point: SweepPoint, site: Profile) -> PlanInputs:
    """Returns what is planned, after all checks; the number of examples is left open.

    Raises:
        InputError: the run asks for what the cluster or the model does not have.
        DataError: the model cannot be built.
    """
    facts = _model_facts(point)
    load_bytes = model_facts.largest_weight_file_bytes(point.recipe.model, facts)
    is_here = site.cluster.scheduler == "local" and site.cluster.accelerator == "cpu"
    inputs = PlanInputs(
        point.recipe,
        site.cluster,
        facts,
        load_bytes,
        core=core_speed() if is_here else None,
        facts_of=_facts_of,
    )
    check_resources(inputs, point.location_of)
    return inputs


def _facts_of(recipe: FullRecipe) -> ModelFacts:
    return model_facts.compute_model_facts(recipe.model, recipe.task, recipe.method)


def _model_facts(point: SweepPoint) -> ModelFacts:
    try:
        return _facts_of(point.recipe)
    except hf_model.ModelConfigError as error:
        key = f"model.config.{error.key}"
        raise InputError([Problem(point.location_of(key), key, error.what, error.fix)]) from None
    except DataError as error:
        section = "method" if str(error).startswith("method") else "model"
        raise DataError(f"{point.location_of(section)} {error}") from None
