"""Recipe + Cluster + model facts to Plan: the first layout that fits, or why none does. No I/O."""

from __future__ import annotations

from collections.abc import Iterator

from hpcft import ds_config
from hpcft.errors import DoesNotFit
from hpcft.layouts import describe, doubling, layouts, precision_of
from hpcft.memory import activations, states
from hpcft.memory.states import CUDA_CONTEXT_BYTES, PROCESS_BYTES
from hpcft.recipe import FullRecipe
from hpcft.records import Cluster, Layout, MemoryItem, ModelFacts, Plan
from hpcft.units import GIB, MIB, format_bytes, format_count

# Slurm kills a job that exceeds --mem; what the rules do not know (page cache, growth) goes here.
HOST_MARGIN = 1.25
# Trained in bfloat16; their activations exceed float16's 65,504 (documented on their model cards).
OVERFLOW_IN_FP16 = ("gemma", "gemma2", "gemma3", "t5", "mt5", "longt5")


def make(recipe: FullRecipe, cluster: Cluster, facts: ModelFacts, *, load_bytes: int = 0) -> Plan:
    """The first layout that fits: fewest GPUs, then least offloading, then largest micro-batch.

    Args:
        recipe: what to train; `problems` found nothing in it.
        cluster: what there is.
        facts: the model's counts and dimensions.
        load_bytes: the largest file that a rank reads at once when loading weights.

    Raises:
        DoesNotFit: with the closest layout and the smallest change that would fit.
    """
    best: Plan | None = None
    for plan in _candidates(recipe, cluster, facts, load_bytes):
        if _fits(plan):
            return _explained(plan, recipe, cluster)
        if best is None or _excess(plan) < _excess(best):
            best = plan
    if best is None:
        raise DoesNotFit(
            f"{recipe.name} on {cluster.name}: train.global_batch_size "
            f"{recipe.train.global_batch_size} cannot be split over the ranks and micro-batches "
            "that the recipe fixes; make it a multiple of nodes × gpus_per_node × "
            "per_device_train_batch_size"
        )
    raise DoesNotFit(_refusal(best, recipe, cluster, facts, load_bytes))


def _fits(plan: Plan) -> bool:
    return _excess(plan) <= 0


def _excess(plan: Plan) -> int:
    """Bytes over the tighter of the two limits; negative when it fits."""
    return max(
        plan.gpu_peak_bytes - plan.gpu_capacity_bytes,
        plan.host_peak_bytes - plan.host_capacity_bytes,
    )


def _candidates(
    recipe: FullRecipe, cluster: Cluster, facts: ModelFacts, load_bytes: int
) -> Iterator[Plan]:
    for layout in layouts(recipe, cluster):
        yield _priced(layout, recipe, cluster, facts, load_bytes)


def _priced(
    layout: Layout, recipe: FullRecipe, cluster: Cluster, facts: ModelFacts, load_bytes: int
) -> Plan:
    """A layout with its predicted memory."""
    precision = precision_of(recipe, cluster)
    on_gpu = cluster.accelerator == "cuda"
    sdpa = recipe.model.attn_implementation == "sdpa"
    gpu = states.model_states(facts, recipe.method, layout, precision, recipe.train.optim)
    gpu += activations.activation_items(facts, layout, precision, recipe.task.max_length, sdpa=sdpa)
    gpu.append(activations.fragmentation(gpu))
    if on_gpu:
        load_bytes = states.loading_bytes(facts, recipe.method, layout, precision, load_bytes)
    host = states.host_states(facts, recipe.method, layout, precision, load_bytes=load_bytes)
    host_capacity = int(cluster.host_memory_gib * GIB)
    if on_gpu:
        assert cluster.gpu is not None
        gpu.append(
            MemoryItem(
                name="CUDA context and communicators", bytes=CUDA_CONTEXT_BYTES, rule="1 GiB"
            )
        )
        capacity = int(cluster.gpu.memory_gib * GIB)
    else:
        # On a CPU a rank's memory is host memory: its process counts, and the node's is their sum.
        ranks = layout.ranks_per_node
        gpu.append(MemoryItem(name="process", bytes=PROCESS_BYTES, rule="1.5 GiB"))
        capacity = host_capacity // ranks
        training = sum(item.bytes for item in gpu) - PROCESS_BYTES
        host.append(
            MemoryItem(
                name="training on the CPU",
                bytes=ranks * training,
                rule=f"{ranks} ranks × predicted peak without the process",
            )
        )
    host_peak = sum(item.bytes for item in host)
    wanted = recipe.resources
    cores = max(1, cluster.cores_per_node // layout.ranks_per_node)
    if cluster.gpus_per_node:
        cores = max(1, cluster.cores_per_node // cluster.gpus_per_node)
    micro = layout.per_device_train_batch_size
    eval_batch = min(64, 4 * micro) if facts.logits_positions == "sequence" else micro
    if recipe.evaluation.per_device_eval_batch_size != "auto":
        eval_batch = recipe.evaluation.per_device_eval_batch_size
    return Plan(
        recipe=recipe.name,
        cluster=cluster.name,
        accelerator=cluster.accelerator,
        layout=layout,
        precision=precision,
        optim=recipe.train.optim,
        per_device_eval_batch_size=eval_batch,
        facts=facts,
        gpu_memory=gpu,
        gpu_capacity_bytes=capacity,
        host_memory=host,
        host_capacity_bytes=host_capacity,
        cpus_per_task=cores,
        mem_mib=int(min(max(host_peak * HOST_MARGIN, GIB), host_capacity) / MIB),
        time_min=cluster.time_limit_min if wanted.time_min == "auto" else wanted.time_min,
        partition=wanted.partition or cluster.partition,
    )


def _explained(plan: Plan, recipe: FullRecipe, cluster: Cluster) -> Plan:
    layout = plan.layout
    unit = "GPU" if plan.accelerator == "cuda" else "rank"
    reasons = [
        f"{layout.world_size} {unit}{'s' * (layout.world_size > 1)}: the fewest allowed that fit"
        if "auto" in (recipe.resources.nodes, recipe.resources.gpus_per_node)
        else f"{layout.world_size} {unit}{'s' * (layout.world_size > 1)}: as the recipe asks",
        f"micro-batch {layout.per_device_train_batch_size} × {layout.gradient_accumulation_steps} "
        f"accumulated × {layout.world_size} ranks = global batch {recipe.train.global_batch_size}",
    ]
    if layout.gradient_checkpointing and recipe.train.gradient_checkpointing == "auto":
        reasons.append("activations are recomputed: without, no micro-batch fits")
    warnings = []
    if plan.precision == "fp16" and plan.facts.model_type in OVERFLOW_IN_FP16:
        name = cluster.gpu.name if cluster.gpu else cluster.name
        warnings.append(
            f"{plan.facts.model_type} overflows in float16 and {name} has no bfloat16: expect "
            "skipped steps or NaN; use a GPU of compute capability 8.0 or train.fp16: false"
        )
    config = ds_config.build(layout, plan.precision, plan.facts, recipe.train, cluster)
    return plan.model_copy(update={"reasons": reasons, "warnings": warnings, "ds_config": config})


# ---------------------------------------------------------------- when nothing fits


def _refusal(
    best: Plan, recipe: FullRecipe, cluster: Cluster, facts: ModelFacts, load_bytes: int
) -> str:
    biggest = sorted(best.gpu_memory, key=lambda item: -item.bytes)[:3]
    parts = ", ".join(f"{item.name} {format_bytes(item.bytes)}" for item in biggest)
    layout = best.layout
    host_bound = best.gpu_peak_bytes <= best.gpu_capacity_bytes
    need, have, where = (
        (best.host_peak_bytes, best.host_capacity_bytes, "host memory of a node")
        if host_bound
        else (best.gpu_peak_bytes, best.gpu_capacity_bytes, _device_name(cluster))
    )
    return "\n".join(
        [
            f"{recipe.name} does not fit {cluster.name}: {format_bytes(need)} needed, "
            f"{format_bytes(have)} of {where}",
            f"  closest: {describe(layout)}: {parts}",
            f"  model: {format_count(facts.parameters.total)} parameters, "
            f"{format_count(facts.parameters.trainable)} trained",
            f"  smallest change: {_smallest_change(recipe, cluster, facts, load_bytes, best)}",
        ]
    )


def _device_name(cluster: Cluster) -> str:
    return (
        f"a {cluster.gpu.name}"
        if cluster.gpu and cluster.accelerator == "cuda"
        else ("host memory for a rank")
    )


_FREEABLE = {
    "train.per_device_train_batch_size": ("train", "per_device_train_batch_size"),
    "train.gradient_checkpointing": ("train", "gradient_checkpointing"),
    "resources.zero_stage": ("resources", "zero_stage"),
    "resources.offload_optimizer": ("resources", "offload_optimizer"),
    "resources.offload_param": ("resources", "offload_param"),
    "resources.gpus_per_node": ("resources", "gpus_per_node"),
    "resources.nodes": ("resources", "nodes"),
}


def _smallest_change(
    recipe: FullRecipe, cluster: Cluster, facts: ModelFacts, load_bytes: int, best: Plan
) -> str:
    free = recipe
    for key, (section, field) in _FREEABLE.items():
        if getattr(getattr(recipe, section), field) == "auto":
            continue
        alone = _with_auto(recipe, section, field)
        found = _first_fit(alone, cluster, facts, load_bytes)
        if found:
            return f"{key}: auto ({describe(found.layout)}, {format_bytes(found.gpu_peak_bytes)})"
        free = _with_auto(free, section, field)
    if free is not recipe:
        found = _first_fit(free, cluster, facts, load_bytes)
        if found:
            return f"leave the layout to the plan: {describe(found.layout)}"
    for nodes in doubling(64):
        if nodes > cluster.max_nodes and cluster.scheduler == "slurm":
            wider = cluster.model_copy(update={"max_nodes": nodes})
            found = _first_fit(free, wider, facts, load_bytes)
            if found:
                allowed = f"{cluster.name} allows {cluster.max_nodes}"
                return f"{found.layout.nodes} nodes ({allowed}): {describe(found.layout)}"
    if best.gpu_peak_bytes <= best.gpu_capacity_bytes:
        return f"nodes with {format_bytes(best.host_peak_bytes)} of host memory"
    return (
        f"{'GPUs' if best.accelerator == 'cuda' else 'nodes'} with "
        f"{format_bytes(best.gpu_peak_bytes)} each, or a smaller method (qlora) or max_length"
    )


def _with_auto(recipe: FullRecipe, section: str, field: str) -> FullRecipe:
    part = getattr(recipe, section).model_copy(update={field: "auto"})
    return recipe.model_copy(update={section: part})


def _first_fit(
    recipe: FullRecipe, cluster: Cluster, facts: ModelFacts, load_bytes: int
) -> Plan | None:
    plans = _candidates(recipe, cluster, facts, load_bytes)
    return next((plan for plan in plans if _fits(plan)), None)
