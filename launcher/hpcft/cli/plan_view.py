"""Shows a plan: as text with tables, or as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from hpcft.cli import console
from hpcft.core.records import EvaluatedLayout, Plan, RunTime
from hpcft.core.units import format_bytes, format_count, format_number, format_seconds
from hpcft.planning.layouts import describe_layout


def as_json(plan: Plan) -> dict[str, object]:
    """Returns a plan for programs: the record, and the sums that follow from it."""
    return {
        **plan.model_dump(mode="json"),
        "gpu_peak_bytes": plan.gpu_peak_bytes,
        "host_peak_bytes": plan.host_peak_bytes,
        "step_s": plan.time.step.total_s if plan.time else None,
        "run_s": plan.time.run_s if plan.time else None,
        "gpu_hours": plan.gpu_hours,
        "gpu_hours_per_1000_steps": plan.gpu_hours_per_1000_steps,
    }


def show(plan: Plan, values: Mapping[str, object]) -> None:
    """Prints a plan for people: a few lines on stderr, and the memory table on stdout.

    Args:
        plan: the plan.
        values: values of the swept fields; empty outside a sweep.
    """
    point = " ".join(f"{key}={value}" for key, value in values.items())
    console.say(f"{plan.recipe} on {plan.cluster} {point}".rstrip())
    for title, text in _lines(plan):
        console.say(f"  {title:8} {text}")
    _show_memory(plan)
    for warning in plan.warnings:
        console.warn(warning)


def _lines(plan: Plan) -> Iterator[tuple[str, str]]:
    """Returns titles and texts: layout, model, reasons, other layouts, memory, time, disk."""
    parameters = plan.facts.parameters
    yield "layout", f"{describe_layout(plan.layout)}, {plan.precision}, {plan.optim}"
    yield (
        "model",
        (
            f"{plan.facts.model_type}, {format_count(parameters.total)} parameters "
            f"({parameters.total:,}), {format_count(parameters.trainable)} trained "
            f"({parameters.trainable:,})"
        ),
    )
    for reason in plan.reasons:
        yield "why", reason
    if plan.next_best:
        yield "next", _describe(plan.next_best)
    for other in plan.cheaper_infeasible:
        yield "not", _describe(other)
    peak, capacity = plan.gpu_peak_bytes or 0, plan.gpu_capacity_bytes
    yield (
        "memory",
        (
            f"{format_bytes(peak)} of {format_bytes(capacity)} per {_unit(plan)} "
            f"({peak / capacity:.0%}); host {format_bytes(plan.host_peak_bytes)} of "
            f"{format_bytes(plan.host_capacity_bytes)}"
        ),
    )
    for line in _time_lines(plan, plan.time) if plan.time else ():
        yield "time", line
    disk = ", ".join(f"{item.name} {format_bytes(item.bytes)}" for item in plan.disk)
    if plan.node_disk_bytes:
        space = format_bytes(plan.node_disk_capacity_bytes)
        disk += f"; offloaded {format_bytes(plan.node_disk_bytes)} of {space} a node"
    if disk:
        yield "disk", disk


def _show_memory(plan: Plan) -> None:
    unit = _unit(plan)
    cells = [[unit, item.name, format_bytes(item.bytes), item.rule] for item in plan.gpu_memory]
    if plan.other_processes_bytes:
        held = format_bytes(plan.other_processes_bytes)
        cells.append([unit, "other processes", held, "not part of the sum above, as stated"])
    cells += [["node", item.name, format_bytes(item.bytes), item.rule] for item in plan.host_memory]
    console.table(["of", "component", "memory", "rule"], cells, right={"memory"})


def _unit(plan: Plan) -> str:
    return "GPU" if plan.accelerator == "cuda" else "rank"


def _describe(other: EvaluatedLayout) -> str:
    """Describes another layout: `1 node × 2, ZeRO-2: 81 GiB of 79.2 GiB a GPU`."""
    cost = f"{format_number(other.gpu_hours_per_1000_steps)} GPU h per 1,000 steps"
    return f"{describe_layout(other.layout)}: {other.why_infeasible or cost}"


def _time_lines(plan: Plan, time: RunTime) -> list[str]:
    """Returns a line on the time of a step and its parts, and one on the time of the run."""
    step, hours = time.step, "GPU hours" if plan.accelerator == "cuda" else "rank hours"
    of_step = (
        f"{format_number(step.total_s)} s a step: compute {format_number(step.compute_s)}, "
        f"communication {format_number(step.communication_s)}, "
        f"offload {format_number(step.offload_s)}; "
        f"{format_number(plan.gpu_hours_per_1000_steps)} {hours} per 1,000 steps"
    )
    if time.run_s is not None:
        of_run = (
            f"{format_seconds(time.run_s)} for {time.steps:,} steps, "
            f"{format_number(plan.gpu_hours)} {hours}"
        )
    elif time.steps is not None:
        training = format_seconds(time.steps * step.total_s)
        of_run = (
            f"{training} of training for {time.steps:,} steps; the size of the scored split is not "
            "known before the run starts"
        )
    else:
        of_run = "not known, because the number of examples is not known before the run starts"
    return [of_step, f"run: {of_run}; time limit {format_seconds(60 * plan.time_min)}"]
