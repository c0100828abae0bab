"""`hpcft plan`: how a recipe would fit a cluster, without submitting it."""

from __future__ import annotations

from typing import Any

import typer

from hpcft.cli.options import ClusterName, Json, Overrides, RecipeName


def add_to(app: typer.Typer) -> None:
    """Registers the verb."""

    @app.command()
    def plan(
        recipe: RecipeName,
        cluster: ClusterName = None,
        override: Overrides = None,
        json: Json = False,
    ) -> None:
        """Show how a recipe would fit a cluster."""
        from hpcft import recipe as recipes
        from hpcft.cli import console
        from hpcft.cluster import profile
        from hpcft.submit import plan_point

        points = recipes.load(recipe, override)
        site = profile.load(cluster or profile.detect())
        plans = [plan_point(point, site) for point in points]
        if json:
            as_json = [_as_json(p) for p in plans]
            console.as_json(as_json[0] if len(plans) == 1 else as_json)
            return
        for point, found in zip(points, plans, strict=True):
            show(found, point.values)


def _as_json(plan: Any) -> dict[str, Any]:
    return {
        **plan.model_dump(mode="json"),
        "gpu_peak_bytes": plan.gpu_peak_bytes,
        "host_peak_bytes": plan.host_peak_bytes,
    }


def show(plan: Any, values: dict[str, Any]) -> None:
    """Prints a plan for people."""
    from hpcft.cli import console
    from hpcft.layouts import describe
    from hpcft.monitor import point_text
    from hpcft.units import format_bytes, format_count

    p = plan.facts.parameters
    console.say(f"{plan.recipe} on {plan.cluster} {point_text(values)}".rstrip())
    console.say(f"  layout   {describe(plan.layout)}, {plan.precision}, {plan.optim}")
    console.say(
        f"  model    {plan.facts.model_type}, {format_count(p.total)} parameters ({p.total:,}), "
        f"{format_count(p.trainable)} trained ({p.trainable:,})"
    )
    for reason in plan.reasons:
        console.say(f"  why      {reason}")
    unit = "GPU" if plan.accelerator == "cuda" else "rank"
    peak, capacity = plan.gpu_peak_bytes, plan.gpu_capacity_bytes
    host, host_capacity = plan.host_peak_bytes, plan.host_capacity_bytes
    console.say(
        f"  memory   {format_bytes(peak)} of {format_bytes(capacity)} per {unit} "
        f"({peak / capacity:.0%}); host {format_bytes(host)} of {format_bytes(host_capacity)}"
    )
    cells = [[unit, i.name, format_bytes(i.bytes), i.rule] for i in plan.gpu_memory]
    cells += [["node", i.name, format_bytes(i.bytes), i.rule] for i in plan.host_memory]
    console.table(["of", "component", "memory", "rule"], cells, right={"memory"})
    for warning in plan.warnings:
        console.warn(warning)
