"""Explains why a run does not fit: what is missing, and the smallest change that would fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.errors import DataError
from hpcft.core.records import Cluster, Plan
from hpcft.core.units import GIB, format_bytes, format_count
from hpcft.planning.inputs import PlanInputs
from hpcft.planning.layouts import describe_layout, powers_of_two
from hpcft.planning.learned_values import context_bytes
from hpcft.planning.memory.model_states import CUDA_CONTEXT_BYTES

FirstFit = Callable[[PlanInputs], Plan | None]
"""Returns the plan of a layout that fits the inputs; None if none does."""

# Share of a GPU's memory that stays free, for what the closed forms leave out.
GPU_MARGIN = 0.02
MAX_NODES_TRIED = 64
# Fields of a recipe that fix a layout, in the order in which freeing them is tried.
_LAYOUT_FIELDS = (
    ("train", "per_device_train_batch_size"),
    ("train", "gradient_checkpointing"),
    ("resources", "zero_stage"),
    ("resources", "offload_optimizer"),
    ("resources", "offload_param"),
    ("resources", "gpus_per_node"),
    ("resources", "nodes"),
)


class CapacityCheck(NamedTuple):
    """A plan's need of one resource, compared with the capacity."""

    need: int
    """Bytes that the plan needs."""
    have: int
    """Capacity in bytes."""
    allowed: int
    """Bytes that a plan may use."""
    resource: str
    """Name of the resource, in words: `a GPU`, `host memory of a node`."""

    @property
    def excess(self) -> int:
        """Bytes over the limit; negative or 0 within it."""
        return self.need - self.allowed

    @property
    def reason(self) -> str:
        """Reason why the plan does not fit: `161 GiB of 79.2 GiB a GPU`; empty within the limit."""
        if self.excess <= 0:
            return ""
        resource = self.resource.replace(" of ", " ").replace(" for ", " ")
        size = f"{format_bytes(self.need)} of {format_bytes(self.have)} {resource}"
        return f"{size}{_margin(self)}"


def _margin(check: CapacityCheck) -> str:
    """Returns the words on the margin, where it alone is exceeded."""
    return f", {GPU_MARGIN:.0%} of which must be left" if check.need <= check.have else ""


def check_rank(need: int, have: int, accelerator: str) -> CapacityCheck:
    """Returns the check of a rank's memory: of its GPU, or of its share of host memory."""
    resource = "a GPU" if accelerator == "cuda" else "host memory for a rank"
    return CapacityCheck(need, have, int((1 - GPU_MARGIN) * have), resource)


def check_node(need: int, have: int) -> CapacityCheck:
    """Returns the check of a node's host memory."""
    return CapacityCheck(need, have, have, "host memory of a node")


def tightest_limit(plan: Plan) -> CapacityCheck:
    """Returns the check that a plan exceeds most, or comes closest to."""
    assert plan.gpu_peak_bytes is not None
    assert plan.host_peak_bytes is not None
    disk_bytes = plan.node_disk_capacity_bytes
    return max(
        check_rank(plan.gpu_peak_bytes, plan.gpu_capacity_bytes, plan.accelerator),
        check_node(plan.host_peak_bytes, plan.host_capacity_bytes),
        CapacityCheck(plan.node_disk_bytes, disk_bytes, disk_bytes, "disk of a node"),
        key=lambda check: check.excess,
    )


def plan_excess(plan: Plan) -> int:
    """Returns the bytes over the tightest of the limits; negative or 0 if the plan fits."""
    return tightest_limit(plan).excess


def why_infeasible(plan: Plan) -> str:
    """Returns why a plan does not fit: `161 GiB of 79.2 GiB a GPU`; empty if it fits."""
    return tightest_limit(plan).reason


def explain_infeasible(inputs: PlanInputs, closest: Plan | None, first_fit: FirstFit) -> str:
    """Returns the text on why no layout fits, by number, with the smallest change that would.

    Args:
        inputs: what was planned.
        closest: the plan with the smallest excess; None if there was no layout to try.
        first_fit: finds a layout that fits changed inputs.
    """
    recipe, cluster, counts = inputs.recipe, inputs.cluster, inputs.facts.parameters
    if closest is None:
        return (
            f"{recipe.name} on {cluster.name}: train.global_batch_size "
            f"{recipe.train.global_batch_size} cannot be split over the ranks and micro-batches "
            "that the recipe fixes; make it a multiple of nodes × gpus_per_node × "
            "per_device_train_batch_size"
        )
    largest = sorted(closest.gpu_memory, key=lambda item: -item.bytes)[:3]
    components = ", ".join(f"{item.name} {format_bytes(item.bytes)}" for item in largest)
    limit = tightest_limit(closest)
    lines = [
        f"{recipe.name} does not fit {cluster.name}: {format_bytes(limit.need)} needed, "
        f"{format_bytes(limit.have)} of {_resource_of_profile(limit, closest, cluster)}",
        f"  closest: {describe_layout(closest.layout)}: {components}",
        f"  model: {format_count(counts.total)} parameters, "
        f"{format_count(counts.trainable)} trained",
    ]
    if closest.other_processes_bytes:
        lines.append(f"  other processes: {_explain_shared_gpu(inputs, closest, first_fit)}")
    else:
        lines.append(f"  smallest change: {_smallest_change(inputs, closest, first_fit)}")
    return "\n".join(lines)


def _resource_of_profile(limit: CapacityCheck, plan: Plan, cluster: Cluster) -> str:
    """Returns the name of the resource that is exceeded, as the profile calls it."""
    if limit.resource != "a GPU" or cluster.gpu is None:
        return limit.resource
    rest = ": other processes hold the rest" if plan.other_processes_bytes else ""
    return f"a {cluster.gpu.name}{rest}{_margin(limit)}"


def _explain_shared_gpu(inputs: PlanInputs, closest: Plan, first_fit: FirstFit) -> str:
    """Returns what a user can do about a GPU that other processes hold too."""
    free = max(0, closest.gpu_capacity_bytes)
    gpu = inputs.cluster.gpu
    assert gpu is not None
    context = context_bytes(inputs.cluster) or CUDA_CONTEXT_BYTES
    if free < context:
        problem = (
            f"less than the {format_bytes(context)} that a process takes before its first tensor, "
            "so that a smaller batch cannot help"
        )
    else:
        problem = "too little for any micro-batch"
    alone = first_fit(inputs.with_cluster(gpu=gpu.model_copy(update={"other_processes_gib": 0.0})))
    if alone:
        advice = (
            f"on a {gpu.name} of its own it fits: {describe_layout(alone.layout)}, "
            f"{format_bytes(alone.gpu_peak_bytes)}; ask for the whole GPU or wait for theirs to end"
        )
    else:
        advice = f"and it does not fit a {gpu.name} of its own either"
    size = f"{closest.other_processes_bytes / GIB:.4g} of {gpu.memory_gib:.4g} GiB"
    return f"they hold {size} and leave {format_bytes(free)}, {problem}; {advice}"


def _smallest_change(inputs: PlanInputs, closest: Plan, first_fit: FirstFit) -> str:
    """Returns the first change that fits: a field set to auto, all of them, nodes, or hardware."""
    freed = inputs
    for section, field in _LAYOUT_FIELDS:
        if getattr(getattr(inputs.recipe, section), field) == "auto":
            continue
        plan = first_fit(inputs.with_recipe(_with_auto(inputs.recipe, section, field)))
        if plan:
            peak = format_bytes(plan.gpu_peak_bytes)
            return f"{section}.{field}: auto ({describe_layout(plan.layout)}, {peak})"
        freed = freed.with_recipe(_with_auto(freed.recipe, section, field))
    if freed is not inputs:
        plan = first_fit(freed)
        if plan:
            return f"leave the layout to the plan: {describe_layout(plan.layout)}"
    return _four_bits(freed, first_fit) or _more_nodes(freed, first_fit) or _other_hardware(closest)


def _four_bits(inputs: PlanInputs, first_fit: FirstFit) -> str:
    """Returns the change of the method that holds frozen weights in 4 bits, if the run fits so."""
    change = inputs.method.four_bit_change
    if not (change and inputs.facts_of and inputs.on_gpu):
        return ""
    fields = inputs.recipe.model_dump()
    try:
        changed = FullRecipe.model_validate({**fields, "method": {**fields["method"], **change}})
        facts = inputs.facts_of(changed)
    except (ValueError, DataError):
        return ""  # The model or the recipe's other fields do not go with 4 bits.
    plan = first_fit(replace(inputs, recipe=changed, facts=facts))
    if plan is None:
        return ""
    what = ", ".join(f"method.{name}: {_as_yaml(value)}" for name, value in change.items())
    return f"{what} ({describe_layout(plan.layout)}, {format_bytes(plan.gpu_peak_bytes)})"


def _as_yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _more_nodes(inputs: PlanInputs, first_fit: FirstFit) -> str:
    """Returns how many nodes the run would fit on; empty where more do not help."""
    cluster = inputs.cluster
    if cluster.scheduler != "slurm":
        return ""
    for nodes in powers_of_two(MAX_NODES_TRIED):
        if nodes <= cluster.max_nodes:
            continue
        plan = first_fit(inputs.with_cluster(max_nodes=nodes))
        if plan:
            allowed = f"{cluster.name} allows {cluster.max_nodes}"
            return f"{plan.layout.nodes} nodes ({allowed}): {describe_layout(plan.layout)}"
    return ""


def _other_hardware(closest: Plan) -> str:
    limit = tightest_limit(closest)
    if limit.resource.endswith(" of a node"):
        resource = limit.resource.removesuffix(" of a node")
        return f"nodes with {format_bytes(limit.need)} of {resource}"
    unit = "GPUs" if closest.accelerator == "cuda" else "nodes"
    peak = format_bytes(closest.gpu_peak_bytes)
    return f"{unit} with {peak} each, or a smaller method (qlora) or max_length"


def _with_auto(recipe: FullRecipe, section: str, field: str) -> FullRecipe:
    part = getattr(recipe, section).model_copy(update={field: "auto"})
    return recipe.model_copy(update={section: part})
