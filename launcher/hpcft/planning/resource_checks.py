"""Checks that cluster and model have what the recipe's resources ask for."""

from __future__ import annotations

from hpcft.config.recipe_types import FullRecipe
from hpcft.config.yaml_document import Loc
from hpcft.core.records import Cluster, ModelFacts
from hpcft.planning.layouts import BF16_CAPABILITY, _rungs
from hpcft.tasks.packing import packing_blocker


def check_resources(
    recipe: FullRecipe, cluster: Cluster, facts: ModelFacts
) -> list[tuple[Loc, str, str]]:
    """What the recipe asks that the cluster or the model does not have: field, what, fix."""
    found: list[tuple[Loc, str, str]] = []
    wanted = recipe.resources
    at = ("resources",)
    if wanted.nodes != "auto" and wanted.nodes > cluster.max_nodes:
        found.append(
            (
                (*at, "nodes"),
                f"expected at most {cluster.max_nodes} ({cluster.name}'s "
                f"max_nodes), got {wanted.nodes}",
                "lower it or correct the profile",
            )
        )
    per_node = cluster.gpus_per_node or cluster.cores_per_node
    unit = "GPUs" if cluster.gpus_per_node else "cores"
    if wanted.gpus_per_node != "auto" and wanted.gpus_per_node > per_node:
        found.append(
            (
                (*at, "gpus_per_node"),
                f"expected at most {per_node}: a node of {cluster.name} "
                f"has {per_node} {unit}, got {wanted.gpus_per_node}",
                "lower it or add nodes",
            )
        )
    if wanted.time_min != "auto" and wanted.time_min > cluster.time_limit_min:
        found.append(
            (
                (*at, "time_min"),
                f"expected at most {cluster.time_limit_min} ({cluster.name}'s "
                f"time_limit_min), got {wanted.time_min}",
                "lower it",
            )
        )
    if wanted.partition and wanted.partition not in (cluster.partition, *cluster.partitions):
        known = (
            ", ".join(
                dict.fromkeys(
                    [*([cluster.partition] if cluster.partition else []), *cluster.partitions]
                )
            )
            or "none"
        )
        found.append(
            (
                (*at, "partition"),
                f"{cluster.name} has no partition {wanted.partition!r}",
                f"its profile lists: {known}",
            )
        )
    for part in ("offload_optimizer", "offload_param"):
        if getattr(wanted, part) == "nvme" and not cluster.node_disk_path:
            found.append(((*at, part), f"{cluster.name} has no node-local disk", "use cpu"))
    if wanted.zero_stage != "auto" and wanted.zero_stage not in recipe.method.zero_stages:
        stages = ", ".join(map(str, recipe.method.zero_stages))
        found.append(
            (
                (*at, "zero_stage"),
                f"{recipe.method.name} works with stages {stages}, got {wanted.zero_stage}",
                "use auto",
            )
        )
    if wanted.zero_stage in (0, 1, 2) and wanted.offload_param in ("cpu", "nvme"):
        found.append(
            ((*at, "offload_param"), "parameters are offloaded by ZeRO-3 only", "set zero_stage: 3")
        )
    if not found and not any(_rungs(recipe, cluster)):
        asked = ", ".join(
            f"{part} {getattr(wanted, part)}"
            for part in ("zero_stage", "offload_optimizer", "offload_param")
        )
        found.append(
            (
                at,
                f"no layout of {recipe.method.name} with {recipe.train.optim} has {asked}",
                "leave one of them to auto: offloading needs ZeRO-2 or 3 and adamw_torch, and "
                "parameters follow the optimizer",
            )
        )
    has_bf16 = cluster.accelerator == "cpu" or (
        cluster.gpu is not None and cluster.gpu.compute_capability >= BF16_CAPABILITY
    )
    if recipe.train.bf16 is True and not has_bf16:
        name = cluster.gpu.name if cluster.gpu else cluster.name
        found.append((("train", "bf16"), f"{name} has no bfloat16", "use auto or fp16: true"))
    if recipe.train.fp16 is True and cluster.accelerator == "cpu":
        found.append((("train", "fp16"), "a CPU does not train in float16", "use auto"))
    extra = recipe.method.extra_tokens
    if facts.max_positions and recipe.task.max_length + extra > facts.max_positions:
        beside = f" beside {extra} virtual ones" if extra else ""
        found.append(
            (
                ("task", "max_length"),
                f"the model takes at most {facts.max_positions} tokens, "
                f"got {recipe.task.max_length}{beside}",
                f"lower it to {max(facts.max_positions - extra, 0)}",
            )
        )
    why_padded = packing_blocker(recipe.task, recipe.method, recipe.model, facts.model_type)
    if recipe.train.packing is True and why_padded:
        found.append((("train", "packing"), f"cannot be: {why_padded}", "use auto or false"))
    return found
