"""Recipe + Cluster + model facts to Plan: the cheapest layout that fits, or why none.

It reads and writes nothing of its own; the default `trace` keeps what it finds in a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.errors import DoesNotFit
from hpcft.core.records import (
    Cluster,
    EvaluatedLayout,
    Layout,
    MemoryItem,
    ModelFacts,
    Plan,
    Precision,
    RunTime,
    Split,
)
from hpcft.core.units import GIB, MIB, format_seconds
from hpcft.planning import (
    calibration,
    caps,
    deepspeed_config,
    disk,
    run_time,
    step_time,
)
from hpcft.planning.infeasible import (
    CapacityCheck,
    check_node,
    check_rank,
    explain_infeasible,
    plan_excess,
    why_infeasible,
)
from hpcft.planning.inputs import PlanInputs
from hpcft.planning.layouts import allowed_layouts, choose_precision
from hpcft.planning.memory import few_shot, model_states, rank_memory
from hpcft.planning.memory.step_memory import step_memory
from hpcft.planning.memory.trace_types import StepMemory, TracedStep
from hpcft.planning.search import Candidate, Search

# Slurm kills a job that exceeds --mem; what the rules do not know (page cache, growth) goes here.
HOST_MARGIN = 1.25
MOST_FALLEN = 8
# Trained in bfloat16; their activations exceed float16's 65,504 (documented on their model cards).
OVERFLOW_IN_FP16 = ("gemma", "gemma2", "gemma3", "t5", "mt5", "longt5")


def make_plan(
    recipe: FullRecipe,
    cluster: Cluster,
    facts: ModelFacts,
    *,
    load_bytes: int = 0,
    examples: Mapping[Split, int] | None = None,
    brief: bool = False,
    trace: Callable[[TracedStep], StepMemory] = step_memory,
) -> Plan:
    """The layout with the least GPU hours among those that fit.

    A run that would exceed its time limit takes more GPUs, if that helps. Layouts whose cost is the
    same within `NEAR_TIE` are decided by fewer GPUs, then less offloading.

    Args:
        recipe: what to train; `problems` found nothing in it.
        cluster: what there is.
        facts: the model's counts and dimensions.
        load_bytes: the largest file that a rank reads at once when loading weights.
        examples: examples of the splits whose size is known.
        brief: whether a refusal does without the smallest change, which takes longer to find.
        trace: how the memory of a step is known.

    Raises:
        DoesNotFit: with the closest layout and the smallest change that would fit.
    """
    case = PlanInputs(recipe, cluster, facts, load_bytes, examples or {}, trace)
    search = _search(case)
    found = search.best()
    if found is not None:
        return _with_reasons(case, search, *found)
    closest = search.closest(plan_excess)
    short = why_infeasible(closest) if closest else "the global batch cannot be split"
    raise DoesNotFit(short if brief else explain_infeasible(case, closest, _first_fit), short)


def _first_fit(case: PlanInputs) -> Plan | None:
    """The cheapest layout that fits, if one does."""
    search = _search(case)
    found = next(search.fitting(), None)
    return search.priced(found) if found else None


def evaluate_all(
    recipe: FullRecipe,
    cluster: Cluster,
    facts: ModelFacts,
    *,
    load_bytes: int = 0,
    trace: Callable[[TracedStep], StepMemory] = step_memory,
) -> list[EvaluatedLayout]:
    """All layouts with memory and time, the cheapest first; arguments as for `make`."""
    search = _search(PlanInputs(recipe, cluster, facts, load_bytes, trace=trace))
    return [layout_summary(candidate, search.priced(candidate)) for candidate in search.ordered]


def layout_summary(
    candidate: Candidate, plan: Plan | None, least: CapacityCheck | None = None
) -> EvaluatedLayout:
    """A layout as it is told beside the chosen one.

    Args:
        candidate: the layout.
        plan: its predicted memory; None where it was not predicted.
        least: in that case what it takes at least.
    """
    known = "" if least is None else f"at least {least.reason}"
    return EvaluatedLayout(
        layout=candidate.layout,
        step=candidate.time.step,
        gpu_peak_bytes=plan.gpu_peak_bytes if plan else None,
        why_infeasible=why_infeasible(plan) if plan else known,
    )


def _search(case: PlanInputs) -> Search:
    return Search(
        [
            _with_time(case, layout)
            for layout in caps.apply_caps(
                allowed_layouts(
                    case.recipe,
                    case.cluster,
                    supports_chunked_loss=case.facts.supports_chunked_loss,
                ),
                case.recipe,
                case.cluster,
            )
        ],
        price=lambda candidate: _with_memory(case, candidate.layout, candidate.time),
        fits=lambda plan: plan_excess(plan) <= 0,
        surely_over=lambda layout: _lower_bound(case, layout).excess,
    )


def _with_time(case: PlanInputs, layout: Layout) -> Candidate:
    """A layout with its predicted time."""
    recipe, cluster, facts = case.recipe, case.cluster, case.facts
    precision = choose_precision(recipe, cluster)
    length = recipe.task.max_length
    step = step_time.predict_step_time(facts, recipe.method, layout, precision, length, cluster)
    step = run_time.with_generation(step, recipe.task.generated_tokens, facts, layout)
    time = run_time.predict_run_time(step, recipe, facts, layout, precision, cluster, case.examples)
    asked = recipe.resources.time_min
    limit_s = 60 * (cluster.time_limit_min if asked == "auto" else asked)
    return Candidate(layout, time, over_limit_s=max(0.0, (time.run_s or 0.0) - limit_s))


def _lower_bound(case: PlanInputs, layout: Layout) -> CapacityCheck:
    """What a layout takes at least, seen without a trace, of what it exceeds most."""
    recipe, cluster = case.recipe, case.cluster
    precision, optim = choose_precision(recipe, cluster), recipe.train.optim
    on_gpu = cluster.accelerator == "cuda"
    tensors = rank_memory.lower_bound_bytes(
        case.facts, recipe.method, layout, precision, optim, on_gpu=on_gpu
    )
    rank = [MemoryItem(name="tensors", bytes=tensors, rule="")]
    rank += _beside_tensors(rank, case, layout)
    host = sum(item.bytes for item in _on_host(case, layout, precision, tensors))
    return max(
        check_rank(
            sum(item.bytes for item in rank), capacity_bytes(cluster, layout), cluster.accelerator
        ),
        check_node(host, int(cluster.host_memory_gib * GIB)),
        key=lambda limit: limit.excess,
    )


def _beside_tensors(
    tensors: list[MemoryItem], case: PlanInputs, layout: Layout
) -> list[MemoryItem]:
    """What a rank holds beside tensors."""
    known = case.cluster.calibration
    if case.cluster.accelerator == "cpu":
        return [model_states.process_item(known)]
    return [
        rank_memory.fragmentation_item(tensors, known),
        *model_states.context_items(layout, known),
    ]


def _on_host(
    case: PlanInputs, layout: Layout, precision: Precision, tensors: int
) -> list[MemoryItem]:
    """Host memory of a node; `tensors` is the bytes of a rank's, which on a CPU are there too."""
    cluster, facts, load_bytes = case.cluster, case.facts, case.load_bytes
    method, known = case.recipe.method, cluster.calibration
    if cluster.accelerator == "cuda":
        load_bytes = model_states.loading_bytes(facts, method, layout, precision, load_bytes)
    host = model_states.host_memory_items(
        facts,
        method,
        layout,
        precision,
        load_bytes=load_bytes,
        workers=case.recipe.train.dataloader_num_workers,
        known=known,
    )
    if cluster.accelerator == "cpu":
        # On a CPU a rank's memory is host memory: its process counts, and the node's is their sum.
        ranks = layout.ranks_per_node
        host.append(
            MemoryItem(
                name="training on the CPU",
                bytes=ranks * tensors,
                rule=f"{ranks} ranks × predicted peak without the process",
            )
        )
    return host


def capacity_bytes(cluster: Cluster, layout: Layout) -> int:
    """What one rank may use: a GPU less what others hold, or its share of the node's memory."""
    if cluster.accelerator == "cpu":
        return int(cluster.host_memory_gib * GIB) // layout.ranks_per_node
    assert cluster.gpu is not None
    return int((cluster.gpu.memory_gib - cluster.gpu.other_processes_gib) * GIB)


def _with_memory(case: PlanInputs, layout: Layout, time: RunTime) -> Plan:
    """A layout with its predicted memory and time."""
    recipe, cluster, facts = case.recipe, case.cluster, case.facts
    precision = choose_precision(recipe, cluster)
    gpu, eval_batch = _of_a_rank(case, layout, precision)
    host = _on_host(case, layout, precision, sum(item.bytes for item in gpu))
    host_capacity = int(cluster.host_memory_gib * GIB)
    gpu += _beside_tensors(gpu, case, layout)
    host_peak = sum(item.bytes for item in host)
    wanted = recipe.resources
    cores = max(1, cluster.cores_per_node // layout.ranks_per_node)
    if cluster.gpus_per_node:
        cores = max(1, cluster.cores_per_node // cluster.gpus_per_node)
    time_min = run_time.time_limit_min(time, recipe, cluster)
    written = disk.run_folder_items(
        facts, recipe, layout, precision, run_time.checkpoint_count(recipe, time.steps)
    )
    return Plan(
        recipe=recipe.name,
        cluster=cluster.name,
        accelerator=cluster.accelerator,
        layout=layout,
        precision=precision,
        optim=recipe.train.optim if recipe.method.trains else "no optimizer",
        per_device_eval_batch_size=eval_batch,
        facts=facts,
        gpu_memory=gpu,
        gpu_capacity_bytes=capacity_bytes(cluster, layout),
        other_processes_bytes=int(cluster.gpu.other_processes_gib * GIB) if cluster.gpu else 0,
        host_memory=host,
        host_capacity_bytes=host_capacity,
        cpus_per_task=cores,
        mem_mib=int(min(max(host_peak * HOST_MARGIN, GIB), host_capacity) / MIB),
        time_min=time_min,
        signal_delay_s=run_time.signal_delay_s(time, written, time_min),
        time=time,
        loading_s=time.start_s,
        saving_s=time.saving_s,
        disk=written,
        node_disk_bytes=disk.node_disk_bytes(facts, layout, precision),
        node_disk_capacity_bytes=int(cluster.node_disk_gib * GIB),
        partition=wanted.partition or cluster.partition,
    )


def _of_a_rank(
    case: PlanInputs, layout: Layout, precision: Precision
) -> tuple[list[MemoryItem], int]:
    """The tensors of a rank at its peak, and how many examples it scores at once."""
    recipe, cluster, facts = case.recipe, case.cluster, case.facts
    batch, optim = layout.per_device_train_batch_size, recipe.train.optim
    if recipe.mode == "few_shot":
        return few_shot.few_shot_items(recipe, layout, facts, precision, cluster.accelerator), batch
    traced = case.trace(rank_memory.traced_step(recipe, layout, cluster, facts, precision))
    on_gpu = cluster.accelerator == "cuda"
    peak = rank_memory.peak_memory(traced, facts, layout, precision, optim, on_gpu=on_gpu)
    wanted = recipe.evaluation.per_device_eval_batch_size if recipe.method.trains else batch
    eval_batch, eval_bytes = rank_memory.evaluation_batch(
        traced,
        peak.total_bytes,
        sum(item.bytes for item in rank_memory.outside_trace(facts, layout, precision, optim)),
        batch,
        fixed=None if wanted == "auto" else wanted,
    )
    items = peak.items
    if eval_bytes > peak.total_bytes:
        rule = f"scoring {eval_batch} at once takes more than training"
        items.append(MemoryItem(name="evaluation", bytes=eval_bytes - peak.total_bytes, rule=rule))
    return items, eval_batch


def _with_reasons(
    case: PlanInputs, search: Search, chosen: Candidate, next_best: Candidate | None
) -> Plan:
    """The chosen plan with reasons, warnings, its neighbours and the DeepSpeed configuration."""
    recipe, cluster, layout = case.recipe, case.cluster, chosen.layout
    plan = search.priced(chosen)
    assert plan.time is not None
    unit = "GPU" if plan.accelerator == "cuda" else "rank"
    fixed = "auto" not in (recipe.resources.nodes, recipe.resources.gpus_per_node)
    reasons = [
        f"{layout.world_size} {unit}{'s' * (layout.world_size > 1)}: "
        + ("as the recipe asks" if fixed else f"the fewest {unit} hours of what fits"),
        _batch_in_words(recipe, layout),
    ]
    if layout.gradient_checkpointing and recipe.train.gradient_checkpointing == "auto":
        reasons.append("activations are recomputed: without, it does not fit or costs more")
    if layout.loss_chunks > 1:
        reasons.append(
            f"logits and loss are computed in {layout.loss_chunks} parts: at once, it does not fit "
            "or costs more"
        )
    reasons += calibration.calibration_reasons(recipe, cluster)
    warnings = []
    if plan.precision == "fp16" and plan.facts.model_type in OVERFLOW_IN_FP16:
        name = cluster.gpu.name if cluster.gpu else cluster.name
        warnings.append(
            f"{plan.facts.model_type} overflows in float16 and {name} has no bfloat16: expect "
            "skipped steps or NaN; use a GPU of compute capability 8.0 or train.fp16: false"
        )
    limit_min, run_s = plan.time_min, plan.time.run_s
    if run_s is not None and run_s > 60 * limit_min:
        warnings.append(
            f"the run is predicted to take {format_seconds(run_s)}, its time limit is "
            f"{format_seconds(60 * limit_min)}, and no layout is faster: it takes more nodes, "
            "fewer steps or a shorter max_length"
        )
    return plan.model_copy(
        update={
            "reasons": reasons,
            "warnings": warnings,
            "next_best": layout_summary(next_best, search.priced(next_best)) if next_best else None,
            "cheaper_infeasible": _fell_out(case, search, chosen),
            "ds_config": deepspeed_config.build_deepspeed_config(
                layout, plan.precision, plan.facts, recipe.train, cluster
            ),
        }
    )


def _batch_in_words(recipe: FullRecipe, layout: Layout) -> str:
    batch, length = layout.per_device_train_batch_size, recipe.task.max_length
    if not recipe.method.trains:
        shots = ", beside the shots" if recipe.mode == "few_shot" else ""
        return f"batches of at most {batch} × {length:,} tokens{shots}"
    return (
        f"micro-batch {batch} × {layout.gradient_accumulation_steps} accumulated × "
        f"{layout.world_size} ranks = global batch {recipe.train.global_batch_size}"
    )


def _fell_out(case: PlanInputs, search: Search, chosen: Candidate) -> list[EvaluatedLayout]:
    """The cheaper kinds of layout that do not fit, one for each number of GPUs and sharding."""
    kinds: dict[tuple[object, ...], EvaluatedLayout] = {}
    for fallen in sorted(search.fallen.values(), key=lambda f: f.cost):
        x = fallen.candidate.layout
        kind = (x.nodes, x.ranks_per_node, x.zero_stage, x.offload_optimizer, x.offload_param)
        if fallen.cost < chosen.cost:  # the last needs the least
            kinds[kind] = layout_summary(fallen.candidate, fallen.plan, _lower_bound(case, x))
    return list(kinds.values())[:MOST_FALLEN]
