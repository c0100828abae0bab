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
        from hpcft.planning.feasibility import calibrated

        is_matrix = clusters is not None or len(recipe) > 1
        if is_matrix and (every or scale):
            raise UsageError("--all and --scale show one recipe on one cluster")
        if every and scale:
            raise UsageError("--all and --scale exclude each other")
        if clusters == "all":
            names = [str(path) for path in cluster_profile.available()]
        elif clusters is not None:
            names = [name.strip() for name in clusters.split(",") if name.strip()]
            if not names:
                raise UsageError("--clusters: expected profiles separated by commas or `all`")
        else:
            names = [cluster or cluster_profile.detect()]
        sites = [
            cluster_profile.with_gpu_memory(
                calibrated(cluster_profile.load(name), None if uncalibrated else runs_dir, console.warn),
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
    from hpcft.config import recipe as recipes
    from hpcft.cli import console
    from hpcft.planning.feasibility import plan_point

    points = recipes.load(name, overrides)
    plans = [plan_point(point, site) for point in points]
    if json:
        shown = [as_json(plan) for plan in plans]
        console.as_json(shown[0] if len(shown) == 1 else shown)
        return
    for point, plan in zip(points, plans, strict=True):
        show(plan, point.values)


def as_json(plan: Any) -> dict[str, Any]:
    """A plan with the sums that follow from it."""
    return {
        **plan.model_dump(mode="json"),
        "gpu_peak_bytes": plan.gpu_peak_bytes,
        "host_peak_bytes": plan.host_peak_bytes,
        "step_s": plan.time.step.total_s,
        "run_s": plan.time.run_s,
        "gpu_hours": plan.gpu_hours,
        "gpu_hours_per_1000_steps": plan.gpu_hours_per_1000_steps,
    }


def show(plan: Any, values: dict[str, Any]) -> None:
    """Prints a plan for people."""
    from hpcft.cli import console
    from hpcft.planning.layouts import describe
    from hpcft.core.units import format_bytes, format_count

    p = plan.facts.parameters
    point = " ".join(f"{key}={value}" for key, value in values.items())
    console.say(f"{plan.recipe} on {plan.cluster} {point}".rstrip())
    console.say(f"  layout   {describe(plan.layout)}, {plan.precision}, {plan.optim}")
    console.say(
        f"  model    {plan.facts.model_type}, {format_count(p.total)} parameters ({p.total:,}), "
        f"{format_count(p.trainable)} trained ({p.trainable:,})"
    )
    for reason in plan.reasons:
        console.say(f"  why      {reason}")
    if plan.next_best:
        console.say(f"  next     {_beside(plan.next_best)}")
    for fallen in plan.fell_out:
        console.say(f"  not      {_beside(fallen)}")
    unit = "GPU" if plan.accelerator == "cuda" else "rank"
    peak, capacity = plan.gpu_peak_bytes, plan.gpu_capacity_bytes
    host, host_capacity = plan.host_peak_bytes, plan.host_capacity_bytes
    console.say(
        f"  memory   {format_bytes(peak)} of {format_bytes(capacity)} per {unit} "
        f"({peak / capacity:.0%}); host {format_bytes(host)} of {format_bytes(host_capacity)}"
    )
    for line in _time_lines(plan):
        console.say(f"  time     {line}")
    disk = ", ".join(f"{item.name} {format_bytes(item.bytes)}" for item in plan.disk)
    if plan.node_disk_bytes:
        room = format_bytes(plan.node_disk_capacity_bytes)
        disk += f"; offloaded {format_bytes(plan.node_disk_bytes)} of {room} a node"
    if disk:
        console.say(f"  disk     {disk}")
    cells = [[unit, i.name, format_bytes(i.bytes), i.rule] for i in plan.gpu_memory]
    if plan.other_processes_bytes:
        held = format_bytes(plan.other_processes_bytes)
        cells.append([unit, "other processes", held, "beside the above, as stated"])
    cells += [["node", i.name, format_bytes(i.bytes), i.rule] for i in plan.host_memory]
    console.table(["of", "component", "memory", "rule"], cells, right={"memory"})
    for warning in plan.warnings:
        console.warn(warning)


def _beside(other: Any) -> str:
    """A layout beside the chosen one: `1 node × 2, ZeRO-2: 81 GiB of 79.2 GiB a GPU`."""
    from hpcft.planning.layouts import describe
    from hpcft.core.units import format_number

    cost = f"{format_number(other.gpu_hours_per_1000_steps)} GPU h per 1,000 steps"
    return f"{describe(other.layout)}: {other.obstacle or cost}"


def _time_lines(plan: Any) -> list[str]:
    """What a step takes and of what, and the run."""
    from hpcft.core.units import format_number, format_seconds

    time = plan.time
    step, hours = time.step, "GPU hours" if plan.accelerator == "cuda" else "rank hours"
    lines = [
        f"{format_number(step.total_s)} s a step: compute {format_number(step.compute_s)}, "
        f"communication {format_number(step.communication_s)}, "
        f"offload {format_number(step.offload_s)}; "
        f"{format_number(plan.gpu_hours_per_1000_steps)} {hours} per 1,000 steps"
    ]
    if time.run_s is None:
        missing = "number of examples" if time.steps is None else "size of the scored split"
        known = ""
        if time.steps is not None:
            training = format_seconds(time.steps * step.total_s)
            known = f"{training} of training for {time.steps:,} steps, "
        lines.append(f"run: {known}{missing} not known before it starts")
    else:
        run = format_seconds(time.run_s)
        lines.append(
            f"run: {run} for {time.steps:,} steps, {format_number(plan.gpu_hours)} {hours}"
        )
    lines[-1] += f"; limit {format_seconds(60 * plan.time_min)}"
    return lines
