"""Does it fit: one run on one cluster, many recipes on many, one run on many numbers of GPUs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hpcft.config import hf_model
from hpcft.config.cluster_profile import Profile
from hpcft.config.recipe_types import SweepPoint
from hpcft.config.yaml_document import dotted_key
from hpcft.core import files
from hpcft.core.errors import (
    DataError,
    InputError,
    Problem,
    StoreError,
)
from hpcft.core.paths import calibration_file
from hpcft.core.records import Calibration, EvaluatedLayout, ModelFacts, Plan
from hpcft.planning import calibration, model_facts, planner
from hpcft.planning.dataset_size import count_examples
from hpcft.planning.resource_checks import check_resources


def with_calibration(site: Profile, runs: Path | None, warn: Callable[[str], None]) -> Profile:
    """The profile with what the runs in a runs folder have measured.

    Args:
        site: the profile.
        runs: the runs folder, which need not be there; None for stated values, those that the
            profile itself has measured left out too.
        warn: is told of a calibration that cannot be read; the plan does without it.
    """
    known = site.cluster.calibration if runs else Calibration()
    file = calibration_file(runs, site.cluster.name) if runs else None
    if file and os.path.isfile(file):
        try:
            files.check_private(file.parent)
            known = calibration.override(known, files.read_record(file, Calibration))
        except StoreError as error:
            warn(f"{error}; planned without it, `hpcft collect` writes it anew")
    return replace(site, cluster=site.cluster.model_copy(update={"calibration": known}))


def plan_resolved(point: SweepPoint, site: Profile, *, brief: bool = False) -> Plan:
    """The plan of one run.

    Args:
        point: the run.
        site: where it is to run.
        brief: whether a refusal does without the smallest change.

    Raises:
        InputError: it asks for what the cluster or the model does not have.
        DoesNotFit: no layout fits.
    """
    facts, load_bytes = _checked(point, site)
    return planner.make_plan(
        point.recipe,
        site.cluster,
        facts,
        load_bytes=load_bytes,
        examples=count_examples(point.recipe.task.data),
        brief=brief,
    )


def evaluate_layouts(point: SweepPoint, site: Profile) -> list[EvaluatedLayout]:
    """Every layout that recipe and profile allow, the cheapest first.

    Raises:
        InputError: it asks for what the cluster or the model does not have.
    """
    facts, load_bytes = _checked(point, site)
    return planner.evaluate_all(point.recipe, site.cluster, facts, load_bytes=load_bytes)


def _checked(point: SweepPoint, site: Profile) -> tuple[ModelFacts, int]:
    """The model's facts and what loading reads at once, after all checks."""
    recipe = point.recipe
    try:
        facts = model_facts.compute_model_facts(recipe.model, recipe.task, recipe.method)
    except hf_model.BadConfig as bad:
        loc = ("model", "config", bad.key)
        raise InputError([Problem(point.where(loc), dotted_key(loc), bad.what, bad.fix)]) from None
    except DataError as error:
        section = "method" if str(error).startswith("method") else "model"
        raise DataError(f"{point.where((section,))} {error}") from None
    found = check_resources(recipe, site.cluster, facts)
    if found:
        raise InputError(
            [Problem(point.where(loc), dotted_key(loc), what, fix) for loc, what, fix in found]
        )
    return facts, model_facts.largest_weight_file_bytes(recipe.model, facts)
