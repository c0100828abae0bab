"""Shows a plan: as text with tables, or as JSON."""

from __future__ import annotations

from typing import Any


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
    from hpcft.core.units import format_bytes, format_count
    from hpcft.planning.layouts import describe_layout

    p = plan.facts.parameters
    point = " ".join(f"{key}={value}" for key, value in values.items())
    console.say(f"{plan.recipe} on {plan.cluster} {point}".rstrip())
    console.say(f"  layout   {describe_layout(plan.layout)}, {plan.precision}, {plan.optim}")
    console.say(
        f"  model    {plan.facts.model_type}, {format_count(p.total)} parameters ({p.total:,}), "
        f"{format_count(p.trainable)} trained ({p.trainable:,})"
    )
    for reason in plan.reasons:
        console.say(f"  why      {reason}")
    if plan.next_best:
        console.say(f"  next     {_beside(plan.next_best)}")
    for fallen in plan.cheaper_infeasible:
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
    from hpcft.core.units import format_number
    from hpcft.planning.layouts import describe_layout

    cost = f"{format_number(other.gpu_hours_per_1000_steps)} GPU h per 1,000 steps"
    return f"{describe_layout(other.layout)}: {other.why_infeasible or cost}"


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
