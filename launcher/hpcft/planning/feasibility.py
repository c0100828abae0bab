"""Does it fit: one run on one cluster, many recipes on many, one run on many numbers of GPUs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from hpcft.planning import calibration
from hpcft.jobs import parallel
from hpcft.core import files
from hpcft.planning import planner
from hpcft.config import recipe as recipes
from hpcft.config.cluster_profile import Profile
from hpcft.config.yaml_document import dotted
from hpcft.core.errors import (DataError, DoesNotFit, HpcftError, InputError, Problem, StoreError, UsageError)
from hpcft.planning.dataset_size import known_examples
from hpcft.planning.layouts import problems
from hpcft.planning import model_facts
from hpcft.core.paths import calibration_file
from hpcft.config.recipe import Point
from hpcft.core.records import (Alternative, Calibration, ModelFacts, Plan)
from hpcft.staging import staged_inputs
from hpcft.core.units import format_bytes


@dataclass(frozen=True)
class Answer:
    """Whether and how something fits: a plan, or why there is none."""

    plan: Plan | None
    """How it fits."""
    reason: str = ""
    """Why it does not; empty when it does."""

    @property
    def short(self) -> str:
        """The answer in a cell: `4×, ZeRO-3, 37 GiB` or `no: 157 GiB of 14.7 GiB a GPU`."""
        if self.plan is None:
            return f"no: {self.reason}"
        layout = self.plan.layout
        sharding = f"ZeRO-{layout.zero_stage}" if layout.zero_stage else ""
        places = {layout.offload_optimizer, layout.offload_param} - {"none"}
        sharding += "".join(f" + {place.replace('cpu', 'CPU')}" for place in sorted(places))
        parts = [f"{layout.world_size}×", sharding, format_bytes(self.plan.gpu_peak_bytes)]
        return ", ".join(part for part in parts if part)


def calibrated(site: Profile, runs: Path | None, warn: Callable[[str], None]) -> Profile:
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
            known = calibration.over(known, files.read(file, Calibration))
        except StoreError as error:
            warn(f"{error}; planned without it, `hpcft collect` writes it anew")
    return replace(site, cluster=site.cluster.model_copy(update={"calibration": known}))


def plan_point(point: Point, site: Profile, *, brief: bool = False) -> Plan:
    """The plan of one run.

    Args:
        point: the run.
        site: where it is to run.
        brief: whether a refusal does without the smallest change.

    Raises:
        InputError: it asks for what the cluster or the model does not have.
        DoesNotFit: no layout fits.
    """
    point = _at_hand(point, site)
    facts, load_bytes = _checked(point, site)
    return planner.make(
        point.recipe,
        site.cluster,
        facts,
        load_bytes=load_bytes,
        examples=known_examples(point.recipe.task.data),
        brief=brief,
    )


def all_layouts(point: Point, site: Profile) -> list[Alternative]:
    """Every layout that recipe and profile allow, the cheapest first.

    Raises:
        InputError: it asks for what the cluster or the model does not have.
    """
    point = _at_hand(point, site)
    facts, load_bytes = _checked(point, site)
    return planner.table(point.recipe, site.cluster, facts, load_bytes=load_bytes)


def _at_hand(point: Point, site: Profile) -> Point:
    """The run with staged folders: what really is there is planned, not what is described."""
    return replace(point, recipe=staged_inputs.at_hand(point.recipe, site.cluster))


def _checked(point: Point, site: Profile) -> tuple[ModelFacts, int]:
    """The model's facts and what loading reads at once, after all checks."""
    recipe = point.recipe
    try:
        facts = model_facts.facts(recipe.model, recipe.task, recipe.method)
    except model_facts.BadConfig as bad:
        loc = ("model", "config", bad.key)
        raise InputError([Problem(point.where(loc), dotted(loc), bad.what, bad.fix)]) from None
    except DataError as error:
        section = "method" if str(error).startswith("method") else "model"
        raise DataError(f"{point.where((section,))} {error}") from None
    found = problems(recipe, site.cluster, facts)
    if found:
        raise InputError(
            [Problem(point.where(loc), dotted(loc), what, fix) for loc, what, fix in found]
        )
    return facts, model_facts.largest_weight_file_bytes(recipe.model, facts)


def answer(point: Point, site: Profile) -> Answer:
    """Whether and how one run fits; what is wrong with it is an answer too."""
    try:
        return Answer(plan_point(point, site, brief=True))
    except HpcftError as error:
        return Answer(None, _reason(error))


def matrix(
    names: list[str],
    sites: list[Profile],
    overrides: list[str] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, list[Answer]]:
    """Which recipe fits where: a row for each run of each recipe, an answer for each profile.

    A recipe that cannot be read is answered so in all its cells, and the rest goes on.
    """
    rows: dict[str, list[Answer]] = {}
    planned = parallel.each(partial(_rows, sites=sites, overrides=overrides), names)
    for number, name in enumerate(names, 1):
        if len(names) > 1:
            say(f"planning {number} of {len(names)}: {name}")
        rows |= next(planned)
    return rows


def _rows(
    name: str, *, sites: list[Profile], overrides: list[str] | None
) -> dict[str, list[Answer]]:
    """The rows of a recipe."""
    try:
        points = recipes.load(name, overrides)
    except HpcftError as error:
        return {name: [Answer(None, _reason(error))] * len(sites)}
    rows = {}
    for point in points:
        values = "".join(f" {key}={value}" for key, value in point.values.items())
        rows[point.recipe.name + values] = [answer(point, site) for site in sites]
    return rows


def scale(point: Point, site: Profile, gpus: int) -> Answer:
    """The run on exactly so many GPUs of that kind, as if the site had enough nodes.

    Raises:
        UsageError: the number does not make whole nodes.
    """
    per_node = site.cluster.gpus_per_node or site.cluster.cores_per_node
    nodes, rest = divmod(gpus, per_node)
    if gpus < 1 or (nodes and rest):
        raise UsageError(
            f"--scale: expected 1 to {per_node} or a multiple of {per_node} GPUs, which a node of "
            f"{site.cluster.name} has, got {gpus}"
        )
    shape = {"nodes": max(1, nodes), "gpus_per_node": per_node if nodes else gpus}
    resources = point.recipe.resources.model_copy(update=shape)
    forced = Point(
        point.values, point.recipe.model_copy(update={"resources": resources}), point.document
    )
    wide = site.cluster.model_copy(update={"max_nodes": shape["nodes"]})
    return answer(forced, Profile(wide, site.document))


def _reason(error: HpcftError) -> str:
    """An error in a cell."""
    if isinstance(error, DoesNotFit):
        return error.short
    if isinstance(error, InputError):
        first = error.problems[0]
        return f"{first.key}: {first.what}" if first.key else first.what
    return str(error).splitlines()[0]
