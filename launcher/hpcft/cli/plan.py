"""`hpcft plan`: how recipes would fit clusters, without submitting anything."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hpcft.cli.options import (
    ClusterName,
    Json,
    Overrides,
    RecipeNames,
    RunsDir,
    Uncalibrated,
)
from hpcft.cli.plan_view import as_json, show
from hpcft.core.paths import DEFAULT_RUNS

Clusters = Annotated[
    str | None,
    typer.Option(
        "--clusters", help="Which recipe fits where: profiles, separated by commas, or `all`.",
        metavar="A,B,…",
    ),
]  # fmt: skip
AllLayouts = Annotated[bool, typer.Option("--all", help="Show every layout, the cheapest first.")]
GpuMemory = Annotated[
    str | None, typer.Option("--gpu-memory", help="Memory of a GPU, in the profile's place: 40GiB.")
]
OtherProcesses = Annotated[
    str | None,
    typer.Option("--other-processes", help="What processes of others hold of a GPU: 4.65GiB."),
]
Scale = Annotated[
    str | None,
    typer.Option(
        "--scale", help="Time on exactly so many GPUs: 8,64,512.", metavar="N,M,…"
    ),
]  # fmt: skip


def add_to(app: typer.Typer) -> None:
    """Registers the verb."""

    @app.command()
    def plan(
        recipe: RecipeNames,
        cluster: ClusterName = None,
        clusters: Clusters = None,
        override: Overrides = None,
        every: AllLayouts = False,
        scale: Scale = None,
        gpu_memory: GpuMemory = None,
        other_processes: OtherProcesses = None,
        uncalibrated: Uncalibrated = False,
        json: Json = False,
        runs_dir: RunsDir = DEFAULT_RUNS,
    ) -> None:
        """Show how a recipe would fit a cluster, or which of several fit where."""
        from hpcft.cli import console, plan_tables
        from hpcft.config import cluster_profile
        from hpcft.core.errors import UsageError
        from hpcft.jobs import default_cluster
        from hpcft.planning.feasibility import with_calibration

        is_matrix = clusters is not None or len(recipe) > 1
        if is_matrix and (every or scale):
            raise UsageError("--all and --scale show one recipe on one cluster")
        if every and scale:
            raise UsageError("--all and --scale exclude each other")
        if clusters == "all":
            names = [str(path) for path in cluster_profile.list_profiles()]
        elif clusters is not None:
            names = [name.strip() for name in clusters.split(",") if name.strip()]
            if not names:
                raise UsageError("--clusters: expected profiles separated by commas or `all`")
        else:
            names = [cluster or default_cluster.detect_cluster()]
        sites = [
            cluster_profile.with_gpu_memory(
                with_calibration(
                    cluster_profile.load_profile(name),
                    None if uncalibrated else runs_dir,
                    console.warn,
                ),
                gpu_memory,
                other_processes,
            )
            for name in names
        ]
        if is_matrix:
            plan_tables.show_matrix(recipe, sites, override, json=json)
        elif scale is not None:
            plan_tables.show_scale(recipe[0], sites[0], override, scale, json=json)
        elif every:
            plan_tables.show_all(recipe[0], sites[0], override, json=json)
        else:
            _show_plans(recipe[0], sites[0], override, json=json)


def _show_plans(name: str, site: Any, overrides: list[str] | None, *, json: bool) -> None:
    from hpcft.cli import console
    from hpcft.config.recipe import load_recipe
    from hpcft.jobs.what_fits import plan_run

    points = load_recipe(name, overrides)
    plans = [plan_run(point, site) for point in points]
    if json:
        shown = [as_json(plan) for plan in plans]
        console.as_json(shown[0] if len(shown) == 1 else shown)
        return
    for point, plan in zip(points, plans, strict=True):
        show(plan, point.values)
