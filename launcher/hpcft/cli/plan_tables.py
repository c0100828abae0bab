"""The tables of `hpcft plan`: recipes by clusters, all layouts of one run, one run by GPU count."""

from __future__ import annotations

from typing import Any

from hpcft.cli import console
from hpcft.cli.plan_view import as_json
from hpcft.config import recipe
from hpcft.config.cluster_profile import Profile
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
    """Which recipe fits where."""
    rows = fit_matrix(names, sites, overrides, say=console.say)
    columns = [site.cluster.name for site in sites]
    if json:
        console.as_json(
            {
                row: dict(zip(columns, map(_answer_as_json, answers), strict=True))
                for row, answers in rows.items()
            }
        )
        return
    cells = [[row, *(answer.short for answer in answers)] for row, answers in rows.items()]
    console.table(["recipe", *columns], cells)


def _answer_as_json(answer: FitResult) -> dict[str, Any]:
    if answer.plan is None:
        return {"fits": False, "reason": answer.reason}
    return {"fits": True, "plan": as_json(answer.plan)}


def show_all(name: str, site: Profile, overrides: list[str] | None, *, json: bool) -> None:
    """Every layout of a recipe's runs."""
    found = [
        (point, alternative)
        for point in recipe.load_recipe(name, overrides)
        for alternative in layouts_of_run(point, site)
    ]
    if json:
        console.as_json([{"point": p.values, **a.model_dump(mode="json")} for p, a in found])
        return
    cells = [
        [
            *([str(point.values)] if point.values else []),
            describe_layout(a.layout),
            format_bytes(a.gpu_peak_bytes),
            "no: " + a.why_infeasible if a.why_infeasible else "yes",
            *_times(a.step),
            format_number(a.gpu_hours_per_1000_steps),
        ]
        for point, a in found
    ]
    header = ["layout", "memory", "fits", *TIMES, HOURS]
    if found and found[0][0].values:
        header = ["point", *header]
    console.table(header, cells, right={"memory", *TIMES, HOURS})


def show_scale(
    name: str, site: Profile, overrides: list[str] | None, counts: str, *, json: bool
) -> None:
    """The predicted step time on given numbers of GPUs."""
    try:
        gpus = [int(count) for count in counts.split(",")]
    except ValueError:
        raise UsageError(f"--scale: expected numbers such as 8,64,512, got {counts!r}") from None
    (point, *others) = recipe.load_recipe(name, overrides)
    if others:
        raise UsageError(f"--scale: {name} is a sweep; -o sweep=null leaves its first run")
    answers = {count: fit_on_gpus(point, site, count) for count in gpus}
    if json:
        console.as_json({str(n): _answer_as_json(answer) for n, answer in answers.items()})
        return
    header, cells = scale_table(point, answers)
    console.table(header, cells, right={"GPUs", "memory", "tokens/s", *TIMES, HOURS})


def scale_table(
    point: SweepPoint, answers: dict[int, FitResult]
) -> tuple[list[str], list[list[str]]]:
    """Header and cells of predicted times by number of GPUs."""
    header = ["GPUs", "layout", "memory", *TIMES, "tokens/s", HOURS]
    length = point.recipe.task.max_length
    cells = []
    for count, answer in answers.items():
        plan = answer.plan
        if plan is None or plan.time is None:
            cells.append([f"{count:,}", answer.short, *[""] * (len(header) - 2)])
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
