"""Checks that cluster and model have what the recipe's resources ask for."""

from __future__ import annotations

from collections.abc import Callable

from hpcft.core.errors import Problems
from hpcft.core.records import Cluster
from hpcft.core.torch_build import INSTALL_GUIDE, installed_build, why_no_kernels
from hpcft.planning.hardware import BF16_CAPABILITY, has_capability
from hpcft.planning.inputs import PlanInputs
from hpcft.planning.layouts import allowed_shardings
from hpcft.tasks.packing import packing_blocker

# Trained in bfloat16; their activations exceed float16's 65,504 (documented on their model cards).
OVERFLOW_IN_FP16 = ("gemma", "gemma2", "gemma3", "gemma3_text", "t5", "mt5", "longt5")


def check_resources(inputs: PlanInputs, location_of: Callable[[str], str]) -> None:
    """Checks that cluster and model have everything that the recipe asks for.

    Args:
        inputs: what is planned.
        location_of: gives the place of a dotted key of the recipe: `file:line`, or an option.

    Raises:
        InputError: with all problems found.
    """
    problems = Problems(location_of)
    _check_amounts(inputs, problems)
    _check_offloading(inputs, problems)
    if not problems.found:
        _check_combination(inputs, problems)
    _check_precision(inputs, problems)
    _check_torch(inputs, problems)
    _check_task(inputs, problems)
    problems.raise_if_any()


def _check_amounts(inputs: PlanInputs, problems: Problems) -> None:
    requested, cluster = inputs.recipe.resources, inputs.cluster
    if requested.nodes != "auto" and requested.nodes > cluster.max_nodes:
        problems.add(
            "resources.nodes",
            expected=f"at most {cluster.max_nodes} ({cluster.name}'s max_nodes)",
            got=requested.nodes,
            fix="lower it, or correct max_nodes in the profile",
        )
    per_node = cluster.gpus_per_node or cluster.cores_per_node
    unit = "GPU" if cluster.gpus_per_node else "core"
    if requested.gpus_per_node != "auto" and requested.gpus_per_node > per_node:
        problems.add(
            "resources.gpus_per_node",
            expected=f"at most {per_node}: a node of {cluster.name} has {per_node} "
            f"{unit}{'s' * (per_node > 1)}",
            got=requested.gpus_per_node,
            fix="lower it, or use more nodes",
        )
    if requested.time_min != "auto" and requested.time_min > cluster.time_limit_min:
        problems.add(
            "resources.time_min",
            expected=f"at most {cluster.time_limit_min} ({cluster.name}'s time_limit_min)",
            got=requested.time_min,
            fix="lower it",
        )
    partitions = [*filter(None, [cluster.partition]), *cluster.partitions]
    if requested.partition and requested.partition not in partitions:
        problems.add(
            "resources.partition",
            f"{cluster.name} has no partition {requested.partition!r}",
            fix=f"its profile lists: {', '.join(dict.fromkeys(partitions)) or 'none'}",
        )


def _check_offloading(inputs: PlanInputs, problems: Problems) -> None:
    requested, method = inputs.recipe.resources, inputs.method
    for part in ("offload_optimizer", "offload_param"):
        if getattr(requested, part) == "nvme" and not inputs.cluster.node_disk_path:
            what = f"{inputs.cluster.name} has no node-local disk"
            problems.add(f"resources.{part}", what, fix="use cpu")
    if requested.zero_stage != "auto" and requested.zero_stage not in method.zero_stages:
        stages = ", ".join(map(str, method.zero_stages))
        problems.add(
            "resources.zero_stage",
            f"{method.name} works with stages {stages}, got {requested.zero_stage}",
            fix="use auto",
        )
    if requested.zero_stage in (0, 1, 2) and requested.offload_param in ("cpu", "nvme"):
        problems.add(
            "resources.offload_param",
            f"parameters are offloaded by ZeRO-3 only, got zero_stage {requested.zero_stage}",
            fix="set zero_stage: 3",
        )


def _check_combination(inputs: PlanInputs, problems: Problems) -> None:
    recipe = inputs.recipe
    if any(allowed_shardings(recipe, inputs.cluster)):
        return
    requested = ", ".join(
        f"{part} {getattr(recipe.resources, part)}"
        for part in ("zero_stage", "offload_optimizer", "offload_param")
    )
    problems.add(
        "resources",
        f"no layout of {recipe.method.name} with {recipe.train.optim} has {requested}",
        fix="leave one of them to auto: offloading needs ZeRO-2 or 3 and adamw_torch, and "
        "parameters are offloaded only together with the optimizer",
    )


def _check_precision(inputs: PlanInputs, problems: Problems) -> None:
    train, cluster = inputs.recipe.train, inputs.cluster
    if train.bf16 is True and inputs.on_gpu and not has_capability(cluster, BF16_CAPABILITY):
        name = cluster.gpu.name if cluster.gpu else cluster.name
        problems.add("train.bf16", f"{name} has no bfloat16", fix="use auto or fp16: true")
    if train.fp16 is True and not inputs.on_gpu:
        problems.add("train.fp16", "a CPU does not train in float16", fix="use auto")


def _check_torch(inputs: PlanInputs, problems: Problems) -> None:
    """Checks that the installed PyTorch has code for the GPU, where the job uses this PyTorch."""
    why = missing_kernels(inputs.cluster)
    if why and not (inputs.cluster.setup or inputs.cluster.python):
        fix = f"install another build; {INSTALL_GUIDE}"
        problems.add("resources", why, fix=fix)


def missing_kernels(cluster: Cluster) -> str:
    """Returns why the PyTorch that is installed here cannot run on a cluster's GPU; else empty."""
    gpu = cluster.gpu
    if cluster.accelerator != "cuda" or gpu is None:
        return ""
    return why_no_kernels(installed_build(), gpu.name, gpu.compute_capability)


def check_overflow(inputs: PlanInputs, location_of: Callable[[str], str]) -> None:
    """Checks that a model that overflows in float16 is not trained whole in it.

    It is the last check: of a run that does not fit either, that is said first.

    Raises:
        InputError: it would be.
    """
    trains_all = inputs.method.trains and not inputs.method.freezes_base
    if not (trains_all and overflows(inputs)):
        return
    problems, gpu = Problems(location_of), inputs.cluster.gpu
    problems.add(
        "train.fp16",
        f"{inputs.facts.model_type} overflows in float16, so that full fine-tuning becomes NaN, "
        f"and {gpu.name if gpu else inputs.cluster.name} has no bfloat16",
        fix=f"use train.fp16: false, or a GPU of compute capability {BF16_CAPABILITY}",
    )
    problems.raise_if_any()


def overflows(inputs: PlanInputs) -> bool:
    """Returns whether the run computes in a type that the model's activations exceed."""
    return inputs.precision == "fp16" and inputs.facts.model_type in OVERFLOW_IN_FP16


def _check_task(inputs: PlanInputs, problems: Problems) -> None:
    recipe, facts = inputs.recipe, inputs.facts
    extra, length = recipe.method.virtual_tokens, recipe.task.max_length
    if facts.max_positions and length + extra > facts.max_positions:
        added = f" and {extra} virtual tokens of {recipe.method.name}" if extra else ""
        problems.add(
            "task.max_length",
            f"the model takes at most {facts.max_positions} tokens, got {length}{added}",
            fix=f"lower it to {max(facts.max_positions - extra, 0)}",
        )
    blocker = packing_blocker(recipe.task, recipe.method, recipe.model, facts.model_type)
    if recipe.train.packing is True and blocker:
        what = f"examples cannot be packed: {blocker}"
        problems.add("train.packing", what, fix="use auto or false")
