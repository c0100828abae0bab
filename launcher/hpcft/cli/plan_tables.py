"""Prints the tables of `hpcft plan`: recipes by profiles, all layouts, times by GPUs."""

from __future__ import annotations

from hpcft.cli import console
from hpcft.cli.plan_view import as_json
from hpcft.config.cluster_profile import Profile
from hpcft.config.recipe import load_recipe
from hpcft.config.recipe_types import SweepPoint
from hpcft.core.errors import UsageError
from hpcft.core.records import StepTime
from hpcft.core.units import format_bytes, format_number
from hpcft.jobs.what_fits import FitResult, fit_matrix, fit_on_gpus, layouts_of_run
from hpcft.planning.layouts import describe_layout

TIMES = ["step s", "compute s", "communication s", "offload s"]
HOURS = "GPU h / 1,000 steps"


def show_matrix(
    names: list[str], sites: list[Profile], overrides: list[str] | None, *, json: bool
) -> None:
    """Prints which recipe fits which profile."""
    rows = fit_matrix(names, sites, overrides=overrides, say=console.say)
    columns = [site.cluster.name for site in sites]
    if json:
        console.as_json(
            {
                row: dict(zip(columns, map(_result_as_json, results), strict=True))
                for row, results in rows.items()
            }
        )
        return
    cells = [[row, *(result.short for result in results)] for row, results in rows.items()]
    console.table(["recipe", *columns], cells)


def _result_as_json(result: FitResult) -> dict[str, object]:
    if result.plan is None:
        return {"fits": False, "reason": result.reason}
    return {"fits": True, "plan": as_json(result.plan)}


def show_all(name: str, site: Profile, overrides: list[str] | None, *, json: bool) -> None:
    """Prints every layout of a recipe's runs."""
    layouts = [
        (point, evaluated)
        for point in load_recipe(name, overrides)
        for evaluated in layouts_of_run(point, site)
    ]
    if json:
        console.as_json([{"point": p.values, **e.model_dump(mode="json")} for p, e in layouts])
        return
    cells = [
        [
            *([str(point.values)] if point.values else []),
            describe_layout(evaluated.layout),
            format_bytes(evaluated.gpu_peak_bytes),
            "no: " + evaluated.why_infeasible if evaluated.why_infeasible else "yes",
            *_times(evaluated.step),
            format_number(evaluated.gpu_hours_per_1000_steps),
        ]
        for point, evaluated in layouts
    ]
    header = ["layout", "memory", "fits", *TIMES, HOURS]
    if layouts and layouts[0][0].values:
        header = ["point", *header]
    console.table(header, cells, right={"memory", *TIMES, HOURS})


def show_scale(
    name: str, site: Profile, overrides: list[str] | None, counts: str, *, json: bool
) -> None:
    """Prints the predicted step time on given numbers of GPUs, separated by commas."""
    try:
        gpus = [int(count) for count in counts.split(",")]
    except ValueError:
        raise UsageError(f"--scale: expected numbers such as 8,64,512, got {counts!r}") from None
    (point, *others) = load_recipe(name, overrides)
    if others:
        raise UsageError(f"--scale: {name} is a sweep; plan it without the sweep: -o sweep=null")
    results = {count: fit_on_gpus(point, site, count) for count in gpus}
    if json:
        console.as_json({str(n): _result_as_json(result) for n, result in results.items()})
        return
    header, cells = scale_table(point, results)
    console.table(header, cells, right={"GPUs", "memory", "tokens/s", *TIMES, HOURS})


def scale_table(
    point: SweepPoint, results: dict[int, FitResult]
) -> tuple[list[str], list[list[str]]]:
    """Returns the header and cells of predicted times by number of GPUs."""
    header = ["GPUs", "layout", "memory", *TIMES, "tokens/s", HOURS]
    length = point.recipe.task.max_length
    cells = []
    for count, result in results.items():
        plan = result.plan
        if plan is None or plan.time is None:
            cells.append([f"{count:,}", result.short, *[""] * (len(header) - 2)])
            continue
        cells.append(
            [
                f"{count:,}",
                describe_layout(plan.layout),
                format_bytes(plan.gpu_peak_bytes),
                *_times(plan.time.step),
                f"{plan.layout.examples_per_step * length / plan.time.step.total_s:,.0f}",
                format_number(plan.gpu_hours_per_1000_steps),
            ]
        )
    return header, cells


def _times(step: StepTime) -> list[str]:
    parts = (step.total_s, step.compute_s, step.communication_s, step.offload_s)
    return [format_number(part) for part in parts]
