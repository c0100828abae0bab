"""Plans a run: the cheapest layout that fits the cluster, or the reason why none does.

It reads and writes nothing of its own; the default `trace` caches what it finds.
"""

from __future__ import annotations

from hpcft.core.errors import DoesNotFit
from hpcft.core.records import Cluster, EvaluatedLayout, Layout, MemoryItem, Plan, RunTime
from hpcft.core.torch_build import INSTALL_GUIDE
from hpcft.core.units import GIB, MIB, format_seconds
from hpcft.planning import calibration, disk, run_time
from hpcft.planning.caps import apply_caps
from hpcft.planning.deepspeed_config import build_deepspeed_config
from hpcft.planning.hardware import BF16_CAPABILITY
from hpcft.planning.infeasible import (
    CapacityCheck,
    check_node,
    check_rank,
    explain_infeasible,
    plan_excess,
    why_infeasible,
)
from hpcft.planning.inputs import PlanInputs
from hpcft.planning.layouts import allowed_layouts
from hpcft.planning.memory import rank_memory
from hpcft.planning.memory.host_memory import host_memory_items
from hpcft.planning.memory.rank_memory import total_bytes
from hpcft.planning.resource_checks import missing_kernels, overflows
from hpcft.planning.search import Search
from hpcft.planning.step_time import overhead_s, predict_step_time

# Slurm kills a job that exceeds --mem; what the closed forms leave out (page cache, growth) goes
# here.
HOST_MARGIN = 1.25
MAX_CHEAPER_INFEASIBLE = 8


def make_plan(inputs: PlanInputs, *, brief: bool = False) -> Plan:
    """Returns the plan with the fewest GPU hours among the layouts that fit.

    A run that would exceed its time limit takes more GPUs, if that helps. Layouts whose cost is the
    same within `NEAR_TIE` are decided by fewer GPUs, then less offloading.

    Args:
        inputs: what is planned.
        brief: whether the error leaves out the smallest change that would fit, which takes longer
            to find.

    Raises:
        DoesNotFit: with the closest layout and the smallest change that would fit.
    """
    search = _search(inputs)
    best = search.best()
    if best is not None:
        return _with_reasons(inputs, search, *best)
    closest = search.closest(plan_excess)
    short = why_infeasible(closest) if closest else "the global batch cannot be split"
    raise DoesNotFit(short if brief else explain_infeasible(inputs, closest, _first_fit), short)


def evaluate_all(inputs: PlanInputs) -> list[EvaluatedLayout]:
    """Returns all layouts with their memory and time, the cheapest first."""
    search = _search(inputs)
    return [_with_peak(evaluated, search.plan(evaluated.layout)) for evaluated in search.ordered]


def _search(inputs: PlanInputs) -> Search:
    recipe, cluster = inputs.recipe, inputs.cluster
    can_chunk = inputs.facts.supports_chunked_loss
    layouts = allowed_layouts(recipe, cluster, supports_chunked_loss=can_chunk)
    return Search(
        [_with_time(inputs, layout) for layout in apply_caps(layouts, recipe, cluster)],
        predict=lambda layout: _with_memory(inputs, layout),
        fits=lambda plan: plan_excess(plan) <= 0,
        lower_bound_excess=lambda layout: _lower_bound(inputs, layout).excess,
    )


def _first_fit(inputs: PlanInputs) -> Plan | None:
    """Returns the plan of the cheapest layout that fits; None if none does."""
    search = _search(inputs)
    cheapest = next(search.feasible(), None)
    return search.plan(cheapest.layout) if cheapest else None


# ---------------------------------------------------------------- time


def _with_time(inputs: PlanInputs, layout: Layout) -> EvaluatedLayout:
    """Returns a layout with its predicted time."""
    time = _predict_time(inputs, layout)
    return EvaluatedLayout(
        layout=layout,
        step=time.step,
        run_s=time.run_s,
        over_limit_s=run_time.over_limit_s(inputs, time),
    )


def _predict_time(inputs: PlanInputs, layout: Layout) -> RunTime:
    return run_time.predict_run_time(inputs, layout, predict_step_time(inputs, layout))


# ---------------------------------------------------------------- memory


def _with_memory(inputs: PlanInputs, layout: Layout) -> Plan:
    """Returns the plan of a layout, with its predicted memory and time, but no reasons."""
    recipe, cluster = inputs.recipe, inputs.cluster
    tensors, eval_batch = rank_memory.tensor_items(inputs, layout)
    overhead = rank_memory.overhead_items(inputs, layout, total_bytes(tensors))
    host = host_memory_items(inputs, layout, total_bytes(tensors))
    host_capacity = int(cluster.host_memory_gib * GIB)
    time = _predict_time(inputs, layout)
    limit_min = run_time.time_limit_min(inputs, time)
    checkpoints = run_time.checkpoint_count(recipe, time.steps)
    written = disk.run_folder_items(inputs, layout, checkpoints)
    return Plan(
        recipe=recipe.name,
        cluster=cluster.name,
        accelerator=cluster.accelerator,
        layout=layout,
        precision=inputs.precision,
        optim=inputs.optim if recipe.method.trains else "no optimizer",
        per_device_eval_batch_size=eval_batch,
        facts=inputs.facts,
        gpu_memory=[*tensors, *overhead],
        gpu_capacity_bytes=rank_memory.capacity_bytes(cluster, layout),
        other_processes_bytes=int(cluster.gpu.other_processes_gib * GIB) if cluster.gpu else 0,
        host_memory=host,
        host_capacity_bytes=host_capacity,
        cpus_per_task=_cores_per_rank(cluster, layout),
        mem_mib=_requested_mib(host, host_capacity),
        time_min=limit_min,
        signal_delay_s=run_time.signal_delay_s(time, written, limit_min),
        time=time,
        efficiency=inputs.efficiency(layout),
        overhead_s=overhead_s(inputs, layout),
        tokens_per_step=inputs.tokens_per_step,
        loading_s=time.start_s,
        saving_s=time.saving_s,
        disk=written,
        node_disk_bytes=disk.node_disk_bytes(inputs, layout),
        node_disk_capacity_bytes=int(cluster.node_disk_gib * GIB),
        partition=recipe.resources.partition or cluster.partition,
    )


def _cores_per_rank(cluster: Cluster, layout: Layout) -> int:
    return max(1, cluster.cores_per_node // (cluster.gpus_per_node or layout.ranks_per_node))


def _requested_mib(host: list[MemoryItem], capacity_bytes: int) -> int:
    """Returns the host memory to request per node, in MiB."""
    return int(min(max(total_bytes(host) * HOST_MARGIN, GIB), capacity_bytes) / MIB)


def _lower_bound(inputs: PlanInputs, layout: Layout) -> CapacityCheck:
    """Returns a lower bound of the layout's tightest limit, from closed forms without a trace."""
    cluster = inputs.cluster
    tensors = rank_memory.lower_bound_bytes(inputs, layout)
    rank = tensors + total_bytes(rank_memory.overhead_items(inputs, layout, tensors))
    host = total_bytes(host_memory_items(inputs, layout, tensors))
    return max(
        check_rank(rank, rank_memory.capacity_bytes(cluster, layout), cluster.accelerator),
        check_node(host, int(cluster.host_memory_gib * GIB)),
        key=lambda check: check.excess,
    )


# ---------------------------------------------------------------- reasons


def _with_reasons(
    inputs: PlanInputs, search: Search, chosen: EvaluatedLayout, next_best: EvaluatedLayout | None
) -> Plan:
    """Returns the plan of the chosen layout with everything that a user and the job read of it."""
    plan = search.plan(chosen.layout)
    return plan.model_copy(
        update={
            "reasons": _reasons(inputs, chosen.layout),
            "warnings": _warnings(inputs, plan),
            "next_best": next_best and _with_peak(next_best, search.plan(next_best.layout)),
            "cheaper_infeasible": _cheaper_infeasible(inputs, search, chosen),
            "ds_config": build_deepspeed_config(inputs, chosen.layout),
        }
    )


def _reasons(inputs: PlanInputs, layout: Layout) -> list[str]:
    recipe = inputs.recipe
    unit = "GPU" if inputs.on_gpu else "rank"
    is_fixed = "auto" not in (recipe.resources.nodes, recipe.resources.gpus_per_node)
    why = "as the recipe asks" if is_fixed else f"the fewest {unit} hours of what fits"
    reasons = [
        f"{layout.world_size} {unit}{'s' * (layout.world_size > 1)}: {why}",
        _describe_batch(inputs, layout),
    ]
    if layout.gradient_checkpointing and recipe.train.gradient_checkpointing == "auto":
        reasons.append(
            "activations are recomputed: otherwise the run does not fit or takes more GPU hours"
        )
    if layout.loss_chunks > 1:
        reasons.append(
            f"logits and loss are computed in {layout.loss_chunks} parts: otherwise the run does "
            "not fit or takes more GPU hours"
        )
    reasons += _time_basis(inputs, layout)
    return reasons + calibration.calibration_reasons(inputs, layout)


def _time_basis(inputs: PlanInputs, layout: Layout) -> list[str]:
    """Returns what the predicted time is based on, in sentences."""
    bound, lengths = inputs.recipe.task.max_length, inputs.lengths
    split = "train" if inputs.method.trains else inputs.recipe.evaluation.split
    if lengths is not None and split in lengths.counts:
        padded = inputs.padded_tokens(layout)
        basis = f"{lengths.describe(split)}, {padded:.0f} in a micro-batch"
    else:
        basis = f"every row having max_length {bound:,} tokens, because no rows are at hand"
    reasons = [f"time by {basis}; memory by max_length {bound:,}"]
    if inputs.core:
        speed = f"{inputs.core.gflops:.3g} GFLOP/s a core"
        reasons.append(f"speed as measured on this machine: {speed}")
    return reasons


def _describe_batch(inputs: PlanInputs, layout: Layout) -> str:
    batch, length = layout.per_device_train_batch_size, inputs.recipe.task.max_length
    if not inputs.method.trains:
        is_few_shot = inputs.recipe.mode == "few_shot" and inputs.recipe.few_shot_task.shots
        shots = " and the shots" if is_few_shot else ""
        return f"batches of at most {batch} × {length:,} tokens{shots}"
    return (
        f"micro-batch {batch} × {layout.gradient_accumulation_steps} accumulated × "
        f"{layout.world_size} ranks = global batch {inputs.recipe.train.global_batch_size}"
    )


def _warnings(inputs: PlanInputs, plan: Plan) -> list[str]:
    warnings = []
    if overflows(inputs):
        gpu = inputs.cluster.gpu
        warnings.append(
            f"{plan.facts.model_type} overflows in float16 and "
            f"{gpu.name if gpu else inputs.cluster.name} has no bfloat16: expect skipped steps or "
            f"NaN; use a GPU of compute capability {BF16_CAPABILITY} or train.fp16: false"
        )
    if why := missing_kernels(inputs.cluster):
        warnings.append(
            f"{why}: the job fails in its first second unless the profile's setup or python gives "
            f"it another build; {INSTALL_GUIDE}"
        )
    run_s = plan.time.run_s if plan.time else None
    if run_s is not None and run_s > 60 * plan.time_min:
        warnings.append(
            f"the run is predicted to take {format_seconds(run_s)}; its time limit is "
            f"{format_seconds(60 * plan.time_min)}, and no layout is faster: allow more nodes or a "
            "longer time limit, train fewer steps, or lower task.max_length"
        )
    return warnings


def _cheaper_infeasible(
    inputs: PlanInputs, search: Search, chosen: EvaluatedLayout
) -> list[EvaluatedLayout]:
    """Returns cheaper layouts that do not fit, one for each number of GPUs and sharding."""
    by_sharding: dict[tuple[object, ...], EvaluatedLayout] = {}
    for kind in sorted(search.infeasible.values(), key=lambda kind: kind.cost):
        if kind.cost >= chosen.cost:
            continue
        x = kind.smallest.layout
        key = (x.nodes, x.ranks_per_node, x.zero_stage, x.offload_optimizer, x.offload_param)
        # The last one of a key needs the least memory.
        by_sharding[key] = (
            _with_peak(kind.smallest, kind.plan)
            if kind.plan
            else _with_lower_bound(kind.smallest, _lower_bound(inputs, x))
        )
    return list(by_sharding.values())[:MAX_CHEAPER_INFEASIBLE]


def _with_peak(evaluated: EvaluatedLayout, plan: Plan) -> EvaluatedLayout:
    """Returns a layout with its predicted memory."""
    peak = {"gpu_peak_bytes": plan.gpu_peak_bytes, "why_infeasible": why_infeasible(plan)}
    return evaluated.model_copy(update=peak)


def _with_lower_bound(evaluated: EvaluatedLayout, check: CapacityCheck) -> EvaluatedLayout:
    """Returns a layout with the reason why even the lower bound of its memory is too large."""
    return evaluated.model_copy(update={"why_infeasible": f"at least {check.reason}"})
