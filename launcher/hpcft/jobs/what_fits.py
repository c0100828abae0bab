"""Finds out which recipes fit which clusters, and how a run scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from hpcft.config.cluster_profile import Profile
from hpcft.config.recipe import load_recipe
from hpcft.config.recipe_types import SweepPoint
from hpcft.core.errors import DoesNotFit, HpcftError, InputError, UsageError, first_line
from hpcft.core.records import EvaluatedLayout, Plan
from hpcft.core.units import format_bytes
from hpcft.jobs import parallel
from hpcft.jobs.sampled_lengths import sample_lengths
from hpcft.planning.feasibility import evaluate_layouts, plan_resolved
from hpcft.staging import staged_inputs
from hpcft.staging.check_rows import check_rows, has_local_data


@dataclass(frozen=True)
class FitResult:
    """A plan, or the reason why there is none."""

    plan: Plan | None
    """The plan; None if the run does not fit."""
    reason: str = ""
    """Why the run does not fit; empty if it does."""

    @property
    def short(self) -> str:
        """Text for a cell of a table: `4×, ZeRO-3, 37 GiB` or `no: 157 GiB of 14.7 GiB a GPU`."""
        if self.plan is None:
            return f"no: {self.reason}"
        layout = self.plan.layout
        sharding = f"ZeRO-{layout.zero_stage}" if layout.zero_stage else ""
        places = {layout.offload_optimizer, layout.offload_param} - {"none"}
        sharding += "".join(f" + {place.replace('cpu', 'CPU')}" for place in sorted(places))
        parts = [f"{layout.world_size}×", sharding, format_bytes(self.plan.gpu_peak_bytes)]
        return ", ".join(part for part in parts if part)


def plan_run(point: SweepPoint, site: Profile, *, brief: bool = False) -> Plan:
    """Plans one run; reads staged inputs from the cache, and every row of data that are here.

    Args:
        point: the run.
        site: the cluster.
        brief: whether the error leaves out the smallest change that would fit.

    Raises:
        InputError: the run requests what the cluster or the model does not have, or the task cannot
            use some rows.
        DataError: data cannot be read.
        DoesNotFit: no layout fits.
    """
    resolved = _resolved(point, site)
    checked = lengths = None
    if has_local_data(resolved.recipe):
        is_staged = resolved.recipe.task.data.path != point.recipe.task.data.path
        checked = check_rows(resolved.recipe, fixed=is_staged)
        lengths = sample_lengths(resolved.recipe, fixed=is_staged)
    plan = plan_resolved(resolved, site, brief=brief, lengths=lengths)
    return checked.added_to(plan) if checked else plan


def layouts_of_run(point: SweepPoint, site: Profile) -> list[EvaluatedLayout]:
    """Lists every layout that recipe and profile allow, the cheapest first.

    Raises:
        InputError: the run requests what the cluster or the model does not have.
    """
    resolved = _resolved(point, site)
    is_staged = resolved.recipe.task.data.path != point.recipe.task.data.path
    return evaluate_layouts(resolved, site, sample_lengths(resolved.recipe, fixed=is_staged))


def _resolved(point: SweepPoint, site: Profile) -> SweepPoint:
    return replace(point, recipe=staged_inputs.resolve_staged(point.recipe, site.cluster))


def fit_on_cluster(point: SweepPoint, site: Profile) -> FitResult:
    """Plans one run; an error in it becomes the reason why it does not fit."""
    try:
        return FitResult(plan_run(point, site, brief=True))
    except HpcftError as error:
        return FitResult(None, _reason(error))


def fit_matrix(
    names: list[str],
    sites: list[Profile],
    *,
    overrides: list[str] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, list[FitResult]]:
    """Plans every run of several recipes on several clusters.

    Args:
        names: names or files of the recipes.
        sites: the clusters.
        overrides: `key=value` changes of every recipe.
        say: receives a sentence for each recipe.

    Returns:
        Name of each run to its result on each cluster. A recipe that cannot be read has one row,
        which says so.
    """
    rows: dict[str, list[FitResult]] = {}
    plan_recipe = partial(_recipe_rows, sites=sites, overrides=overrides)
    planned = parallel.parallel_map(plan_recipe, names)
    for number, name in enumerate(names, 1):
        if len(names) > 1:
            say(f"planning {number} of {len(names)}: {name}")
        rows |= next(planned)
    return rows


def _recipe_rows(
    name: str, *, sites: list[Profile], overrides: list[str] | None
) -> dict[str, list[FitResult]]:
    """Returns the rows of one recipe."""
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
    """Plans a run on a number of GPUs of a cluster, as if it had enough nodes.

    Args:
        point: the run.
        site: the cluster.
        gpus: GPUs in all; if they are more than a node has, a multiple of those of a node.

    Raises:
        UsageError: the number does not make whole nodes.
    """
    per_node = site.cluster.gpus_per_node or site.cluster.cores_per_node
    nodes, rest = divmod(gpus, per_node)
    if gpus < 1 or (nodes and rest):
        raise UsageError(
            f"--scale: expected 1 to {per_node} or a multiple of {per_node} GPUs, as a node of "
            f"{site.cluster.name} has {per_node}; got {gpus}"
        )
    shape = {"nodes": max(1, nodes), "gpus_per_node": per_node if nodes else gpus}
    resources = point.recipe.resources.model_copy(update=shape)
    fixed = replace(point, recipe=point.recipe.model_copy(update={"resources": resources}))
    cluster = site.cluster.model_copy(update={"max_nodes": shape["nodes"]})
    return fit_on_cluster(fixed, replace(site, cluster=cluster))


def _reason(error: HpcftError) -> str:
    """Returns an error's text for a cell of a table."""
    if isinstance(error, DoesNotFit):
        return error.short
    if isinstance(error, InputError):
        first = error.problems[0]
        return f"{first.key}: {first.what}" if first.key else first.what
    return first_line(error)
