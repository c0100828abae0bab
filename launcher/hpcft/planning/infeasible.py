"""What a recipe that does not fit is told: what is missing, and the smallest change that fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.records import Cluster, Plan
from hpcft.core.units import GIB, format_bytes, format_count
from hpcft.planning.inputs import PlanInputs
from hpcft.planning.layouts import describe_layout, powers_of_two
from hpcft.planning.memory.model_states import CUDA_CONTEXT_BYTES

FirstFit = Callable[[PlanInputs], Plan | None]

# Of a GPU this share is left: what the rules do not know.
GPU_MARGIN = 0.02
MOST_NODES = 64  # as wide as the smallest change is looked for
_FREEABLE = {
    "train.per_device_train_batch_size": ("train", "per_device_train_batch_size"),
    "train.gradient_checkpointing": ("train", "gradient_checkpointing"),
    "resources.zero_stage": ("resources", "zero_stage"),
    "resources.offload_optimizer": ("resources", "offload_optimizer"),
    "resources.offload_param": ("resources", "offload_param"),
    "resources.gpus_per_node": ("resources", "gpus_per_node"),
    "resources.nodes": ("resources", "nodes"),
}


class CapacityCheck(NamedTuple):
    """One of the things that a plan may exceed."""

    need: int
    """Bytes that the plan takes."""
    have: int
    """Bytes that there are."""
    allowed: int
    """Bytes that a plan may take of them."""
    what: str
    """What they are of."""

    @property
    def excess(self) -> int:
        """Bytes over it; negative or 0 when it is kept."""
        return self.need - self.allowed

    @property
    def reason(self) -> str:
        """Why it is not kept: `161 GiB of 79.2 GiB a GPU`; empty when it is."""
        if self.excess <= 0:
            return ""
        margin = f", {GPU_MARGIN:.0%} of which must be left" if self.need <= self.have else ""
        what = self.what.replace(" of ", " ").replace(" for ", " ")
        return f"{format_bytes(self.need)} of {format_bytes(self.have)} {what}{margin}"


def tightest_limit(plan: Plan) -> CapacityCheck:
    """Returns the limit that a plan exceeds most, or comes closest to."""
    assert plan.gpu_peak_bytes is not None
    assert plan.host_peak_bytes is not None
    return max(
        check_rank(plan.gpu_peak_bytes, plan.gpu_capacity_bytes, plan.accelerator),
        check_node(plan.host_peak_bytes, plan.host_capacity_bytes),
        CapacityCheck(
            plan.node_disk_bytes,
            plan.node_disk_capacity_bytes,
            plan.node_disk_capacity_bytes,
            "disk of a node",
        ),
        key=lambda limit: limit.excess,
    )


def check_rank(need: int, have: int, accelerator: str) -> CapacityCheck:
    """What a rank takes of a GPU, or of the host's memory."""
    what = "a GPU" if accelerator == "cuda" else "host memory for a rank"
    return CapacityCheck(need, have, int((1 - GPU_MARGIN) * have), what)


def check_node(need: int, have: int) -> CapacityCheck:
    """What a node takes of its host memory."""
    return CapacityCheck(need, have, have, "host memory of a node")


def plan_excess(plan: Plan) -> int:
    """Bytes over the tightest of the limits; negative or 0 when it fits."""
    return tightest_limit(plan).excess


def why_infeasible(plan: Plan) -> str:
    """Why a plan does not fit: `161 GiB of 79.2 GiB a GPU`; empty when it does."""
    return tightest_limit(plan).reason


def explain_infeasible(case: PlanInputs, closest: Plan | None, first_fit: FirstFit) -> str:
    """Why no layout of a case fits, by number, and the smallest change that would.

    Args:
        case: what was planned.
        closest: the layout that misses by least; None where there was none to try.
        first_fit: finds a layout that fits a changed case.
    """
    recipe, cluster, facts = case.recipe, case.cluster, case.facts
    if closest is None:
        return (
            f"{recipe.name} on {cluster.name}: train.global_batch_size "
            f"{recipe.train.global_batch_size} cannot be split over the ranks and micro-batches "
            "that the recipe fixes; make it a multiple of nodes × gpus_per_node × "
            "per_device_train_batch_size"
        )
    biggest = sorted(closest.gpu_memory, key=lambda item: -item.bytes)[:3]
    parts = ", ".join(f"{item.name} {format_bytes(item.bytes)}" for item in biggest)
    limit = tightest_limit(closest)
    lines = [
        f"{recipe.name} does not fit {cluster.name}: {format_bytes(limit.need)} needed, "
        f"{format_bytes(limit.have)} of {_of_what(limit, closest, cluster)}",
        f"  closest: {describe_layout(closest.layout)}: {parts}",
        f"  model: {format_count(facts.parameters.total)} parameters, "
        f"{format_count(facts.parameters.trainable)} trained",
    ]
    if closest.other_processes_bytes:
        lines.append(f"  other processes: {_others(case, closest, first_fit)}")
    else:
        lines.append(f"  smallest change: {_smallest_change(case, closest, first_fit)}")
    return "\n".join(lines)


def _of_what(limit: CapacityCheck, plan: Plan, cluster: Cluster) -> str:
    """What a limit is of, in the words of the profile."""
    if limit.what != "a GPU" or cluster.gpu is None:
        return limit.what
    rest = ": other processes hold the rest" if plan.other_processes_bytes else ""
    margin = f", {GPU_MARGIN:.0%} of which must be left" if limit.need <= limit.have else ""
    return f"a {cluster.gpu.name}{rest}{margin}"


def _others(case: PlanInputs, closest: Plan, first_fit: FirstFit) -> str:
    """What a user can do about a GPU that others hold: not a smaller batch."""
    held, free = closest.other_processes_bytes, max(0, closest.gpu_capacity_bytes)
    gpu = case.cluster.gpu
    assert gpu is not None
    context = case.cluster.calibration.context_bytes or CUDA_CONTEXT_BYTES
    alone = case.with_cluster(gpu=gpu.model_copy(update={"other_processes_gib": 0.0}))
    fits = first_fit(alone)
    least = (
        f"less than the {format_bytes(context)} that a process takes before its first "
        "tensor, so that a smaller batch cannot help"
        if free < context
        else "too little for any micro-batch"
    )
    cure = (
        f"on a {gpu.name} of its own it fits: {describe_layout(fits.layout)}, "
        f"{format_bytes(fits.gpu_peak_bytes)}; ask for the whole GPU or wait for theirs to end"
        if fits
        else f"and it does not fit a {gpu.name} of its own either"
    )
    size = f"{held / GIB:.4g} of {gpu.memory_gib:.4g} GiB"
    return f"they hold {size} and leave {format_bytes(free)}, {least}; {cure}"


def _smallest_change(case: PlanInputs, closest: Plan, first_fit: FirstFit) -> str:
    free, cluster = case, case.cluster
    for key, (section, name) in _FREEABLE.items():
        if getattr(getattr(case.recipe, section), name) == "auto":
            continue
        found = first_fit(case.with_recipe(_with_auto(case.recipe, section, name)))
        if found:
            return f"{key}: auto ({describe_layout(found.layout)}, {format_bytes(found.gpu_peak_bytes)})"
        free = free.with_recipe(_with_auto(free.recipe, section, name))
    if free is not case:
        found = first_fit(free)
        if found:
            return f"leave the layout to the plan: {describe_layout(found.layout)}"
    if cluster.scheduler == "slurm":
        for nodes in powers_of_two(MOST_NODES):
            found = (
                first_fit(free.with_cluster(max_nodes=nodes)) if nodes > cluster.max_nodes else None
            )
            if found:
                allowed = f"{cluster.name} allows {cluster.max_nodes}"
                return f"{found.layout.nodes} nodes ({allowed}): {describe_layout(found.layout)}"
    limit = tightest_limit(closest)
    if limit.what.endswith(" of a node"):
        return f"nodes with {format_bytes(limit.need)} of {limit.what.removesuffix(' of a node')}"
    return (
        f"{'GPUs' if closest.accelerator == 'cuda' else 'nodes'} with "
        f"{format_bytes(closest.gpu_peak_bytes)} each, or a smaller method (qlora) or max_length"
    )


def _with_auto(recipe: FullRecipe, section: str, field: str) -> FullRecipe:
    part = getattr(recipe, section).model_copy(update={field: "auto"})
    return recipe.model_copy(update={section: part})
