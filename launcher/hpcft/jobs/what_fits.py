"""Answers which recipes fit which clusters, and how a run scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from hpcft.config.cluster_profile import Profile
from hpcft.config.recipe import load_recipe
from hpcft.config.recipe_types import SweepPoint
from hpcft.core.errors import DoesNotFit, HpcftError, InputError, UsageError
from hpcft.core.records import EvaluatedLayout, Plan
from hpcft.core.units import format_bytes
from hpcft.jobs import parallel
from hpcft.planning.feasibility import evaluate_layouts, plan_resolved
from hpcft.staging import staged_inputs


@dataclass(frozen=True)
class FitResult:
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


def plan_run(point: SweepPoint, site: Profile, *, brief: bool = False) -> Plan:
    """Plans one run, with the folders of whatever is staged in the place of hub names.

    Args:
        point: the run.
        site: the cluster.
        brief: whether a refusal does without the smallest change that would fit.

    Raises:
        InputError: the run asks for what the cluster or the model does not have.
        DoesNotFit: no layout fits.
    """
    return plan_resolved(_resolved(point, site), site, brief=brief)


def layouts_of_run(point: SweepPoint, site: Profile) -> list[EvaluatedLayout]:
    """Lists every layout that recipe and profile allow, the cheapest first.

    Raises:
        InputError: the run asks for what the cluster or the model does not have.
    """
    return evaluate_layouts(_resolved(point, site), site)


def _resolved(point: SweepPoint, site: Profile) -> SweepPoint:
    return replace(point, recipe=staged_inputs.resolve_staged(point.recipe, site.cluster))


def fit_on_cluster(point: SweepPoint, site: Profile) -> FitResult:
    """Whether and how one run fits; what is wrong with it is an answer too."""
    try:
        return FitResult(plan_run(point, site, brief=True))
    except HpcftError as error:
        return FitResult(None, _reason(error))


def fit_matrix(
    names: list[str],
    sites: list[Profile],
    overrides: list[str] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, list[FitResult]]:
    """Which recipe fits where: a row for each run of each recipe, an answer for each profile.

    A recipe that cannot be read is answered so in all its cells, and the rest goes on.
    """
    rows: dict[str, list[FitResult]] = {}
    planned = parallel.parallel_map(partial(_rows, sites=sites, overrides=overrides), names)
    for number, name in enumerate(names, 1):
        if len(names) > 1:
            say(f"planning {number} of {len(names)}: {name}")
        rows |= next(planned)
    return rows


def _rows(
    name: str, *, sites: list[Profile], overrides: list[str] | None
) -> dict[str, list[FitResult]]:
    """The rows of a recipe."""
    try:
        points = load_recipe(name, overrides)
    except HpcftError as error:
        return {name: [FitResult(None, _reason(error))] * len(sites)}
    rows = {}
    for point in points:
        values = "".join(f" {key}={value}" for key, value in point.values.items())
        rows[point.recipe.name + values] = [fit_on_cluster(point, site) for site in sites]
    return rows


def fit_on_gpus(point: SweepPoint, site: Profile, gpus: int) -> FitResult:
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
    forced = SweepPoint(
        point.values, point.recipe.model_copy(update={"resources": resources}), point.document
    )
    wide = site.cluster.model_copy(update={"max_nodes": shape["nodes"]})
    return fit_on_cluster(forced, Profile(wide, site.document))


def _reason(error: HpcftError) -> str:
    """An error in a cell."""
    if isinstance(error, DoesNotFit):
        return error.short
    if isinstance(error, InputError):
        first = error.problems[0]
        return f"{first.key}: {first.what}" if first.key else first.what
    return str(error).splitlines()[0]
