"""`hpcft plan`: shows how recipes fit clusters, without submitting anything."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpcft.cli import completion
from hpcft.cli.options import (
    ClusterName,
    Json,
    Overrides,
    RecipeNames,
    RunsDir,
    Uncalibrated,
)
from hpcft.core.errors import UsageError
from hpcft.core.paths import DEFAULT_RUNS

if TYPE_CHECKING:
    from hpcft.config.cluster_profile import Profile

Clusters = Annotated[
    str | None,
    typer.Option(
        "--clusters", autocompletion=completion.profile_lists, metavar="PROFILE,…",
        help="Show which recipe fits which of these profiles; `all` for every shipped one.",
    ),
]  # fmt: skip
AllLayouts = Annotated[bool, typer.Option("--all", help="Show every layout, the cheapest first.")]
GpuMemory = Annotated[
    str | None,
    typer.Option(
        "--gpu-memory", metavar="SIZE", help="Memory of a GPU, if it differs from the profile's."
    ),
]
OtherProcesses = Annotated[
    str | None,
    typer.Option(
        "--other-processes", metavar="SIZE",
        help="Memory that processes of other users hold on each GPU, for example 4.65GiB.",
    ),
]  # fmt: skip
Scale = Annotated[
    str | None,
    typer.Option("--scale", metavar="GPUS,…", help="Show the time on so many GPUs: 8,64,512."),
]


def plan(
    recipe: RecipeNames,
    cluster: ClusterName = None,
    clusters: Clusters = None,
    override: Overrides = None,
    all_layouts: AllLayouts = False,
    scale: Scale = None,
    gpu_memory: GpuMemory = None,
    other_processes: OtherProcesses = None,
    uncalibrated: Uncalibrated = False,
    json: Json = False,
    runs_dir: RunsDir = DEFAULT_RUNS,
) -> None:
    """Show how recipes fit clusters.

    One recipe on one cluster gives its plan: layout, memory, time and disk. Several recipes, or
    --clusters, give a table of which recipe fits where. Nothing is submitted.
    """
    # Imported here, so that `hpcft --help` is quick.
    from hpcft.cli import plan_tables
    from hpcft.config.cluster_profile import with_gpu_memory
    from hpcft.config.recipe import check_names, check_overrides

    is_matrix = clusters is not None or len(recipe) > 1
    if is_matrix and (all_layouts or scale):
        raise UsageError("--all and --scale show one recipe on one cluster")
    # A table says which recipe fits, not that there is none: `-o train.seed 1` names a recipe `1`.
    check_overrides(override)
    check_names(recipe)
    if all_layouts and scale:
        raise UsageError("--all and --scale exclude each other")
    sites = [
        with_gpu_memory(site, gpu_memory, other_processes)
        for site in _load_sites(cluster, clusters, None if uncalibrated else runs_dir)
    ]
    if is_matrix:
        plan_tables.show_matrix(recipe, sites, override, json=json)
    elif scale is not None:
        plan_tables.show_scale(recipe[0], sites[0], override, scale, json=json)
    elif all_layouts:
        plan_tables.show_all(recipe[0], sites[0], override, json=json)
    else:
        _show_plans(recipe[0], sites[0], override, json=json)


def _load_sites(
    cluster: str | None, clusters: str | None, calibrated_by: Path | None
) -> list[Profile]:
    """Loads the profiles that `--cluster` or `--clusters` name, with their calibration."""
    from hpcft.cli import console
    from hpcft.config.cluster_profile import list_profiles, load_profile
    from hpcft.jobs.default_cluster import detect_cluster
    from hpcft.planning.feasibility import with_calibration

    if clusters is None:
        names = [cluster or detect_cluster()]
    elif clusters == "all":
        names = [str(path) for path in list_profiles()]
    else:
        names = [name.strip() for name in clusters.split(",") if name.strip()]
        if not names:
            raise UsageError("--clusters: expected profiles separated by commas or `all`")
    return [with_calibration(load_profile(name), calibrated_by, console.warn) for name in names]


def _show_plans(name: str, site: Profile, overrides: list[str] | None, *, json: bool) -> None:
    from hpcft.cli import console, plan_view
    from hpcft.config.recipe import load_recipe
    from hpcft.jobs.what_fits import plan_run

    points = load_recipe(name, overrides)
    plans = [plan_run(point, site) for point in points]
    if json:
        shown = [plan_view.as_json(plan) for plan in plans]
        console.as_json(shown[0] if len(shown) == 1 else shown)
        return
    for point, plan in zip(points, plans, strict=True):
        plan_view.show(plan, point.values)
