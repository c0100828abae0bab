"""Which layouts a recipe and a profile allow, and what the recipe asks in vain."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from hpcft.config.yaml_document import Loc
from hpcft.config.recipe import FullRecipe
from hpcft.core.records import (Cluster, Layout, ModelFacts, Precision)
from hpcft.tasks.packing import obstacle

BF16_CAPABILITY = 8.0  # Ampere; NVIDIA CUDA C++ Programming Guide, arithmetic throughput
MAX_MICRO_BATCH = 64
MOST_SCORED_TOKENS = 16_384  # a GPU is busy with these; larger batches gain nothing
LOSS_CHUNKS = (1, 8)  # parts of the logits to try, one after the other

# ZeRO stage, optimizer offload, parameter offload, in the order of what they cost in speed.
_RUNGS: tuple[tuple[int, Any, Any], ...] = (
    (0, "none", "none"),
    (1, "none", "none"),
    (2, "none", "none"),
    (3, "none", "none"),
    (3, "none", "cpu"),
    (2, "cpu", "none"),
    (3, "cpu", "none"),
    (3, "cpu", "cpu"),
    (3, "nvme", "none"),
    (3, "nvme", "nvme"),
)


def problems(recipe: FullRecipe, cluster: Cluster, facts: ModelFacts) -> list[tuple[Loc, str, str]]:
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
    why_padded = obstacle(recipe.task, recipe.method, recipe.model, facts.model_type)
    if recipe.train.packing is True and why_padded:
        found.append((("train", "packing"), f"cannot be: {why_padded}", "use auto or false"))
    return found


def layouts(
    recipe: FullRecipe, cluster: Cluster, *, loss_in_parts: bool = False
) -> Iterator[Layout]:
    """The layouts that recipe and profile allow; of one shape the least offloading first.

    Args:
        recipe: what to train.
        cluster: what there is.
        loss_in_parts: whether the model's loss can be computed in parts (`ModelFacts`).
    """
    wanted, train = recipe.resources, recipe.train
    most = cluster.gpus_per_node if cluster.accelerator == "cuda" else 1
    ranks = [wanted.gpus_per_node] if wanted.gpus_per_node != "auto" else doubling(most)
    nodes = [wanted.nodes] if wanted.nodes != "auto" else doubling(cluster.max_nodes)
    if wanted.gpus_per_node == "auto" and wanted.nodes != "auto" and wanted.nodes > 1:
        ranks = [most]  # who asks for several nodes means whole ones
    shapes = [(n, r) for n in nodes for r in ranks if n == 1 or r == ranks[-1]]
    trains = recipe.method.trains
    recomputing = train.gradient_checkpointing if trains else False
    checkpointing = [False, True] if recomputing == "auto" else [recomputing]
    chunks = LOSS_CHUNKS if loss_in_parts and trains else (1,)
    for (n, r), rung in itertools.product(shapes, list(_rungs(recipe, cluster))):
        stage, optimizer, param = rung
        if wanted.zero_stage == "auto" and stage and n * r == 1 and optimizer == param == "none":
            continue  # sharding over one rank gains nothing
        for recompute, parts in itertools.product(checkpointing, chunks):
            for micro in _micro_batches(recipe, n * r):
                yield Layout(
                    nodes=n,
                    ranks_per_node=r,
                    per_device_train_batch_size=micro,
                    gradient_accumulation_steps=train.global_batch_size // (micro * n * r)
                    if trains
                    else 1,
                    gradient_checkpointing=recompute,
                    zero_stage=stage,
                    offload_optimizer=optimizer,
                    offload_param=param,
                    loss_chunks=parts,
                )


def _rungs(recipe: FullRecipe, cluster: Cluster) -> Iterator[tuple[int, Any, Any]]:
    """The combinations of ZeRO stage and offloading that recipe and profile allow."""
    wanted = recipe.resources
    for stage, optimizer, param in _RUNGS:
        moved = {"offload_optimizer": optimizer, "offload_param": param}
        places = {place for place in moved.values() if place != "none"}
        asked = [getattr(wanted, part) for part, place in moved.items() if place != "none"]
        if (
            stage in recipe.method.zero_stages
            # To score a trained task is the Trainer's, which shards for training alone.
            and not (stage and recipe.scores_alone)
            and wanted.zero_stage in ("auto", stage)
            and all(getattr(wanted, part) in ("auto", place) for part, place in moved.items())
            # Offloading runs DeepSpeed's own CPU Adam, and from a CPU nothing is gained by it.
            and (not places or recipe.train.optim in ("adamw_torch", "adamw_torch_fused"))
            and (cluster.accelerator == "cuda" or "auto" not in asked)
            and ("nvme" not in places or cluster.node_disk_path is not None)
            # Parameters follow the optimizer, where there is one.
            and (param == "none" or (optimizer != "none") == recipe.method.trains)
            and (recipe.method.trains or optimizer == "none")
        ):
            yield stage, optimizer, param


def doubling(most: int) -> list[int]:
    """1, 2, 4, … and `most` itself."""
    return sorted({min(2**power, most) for power in range(most.bit_length() + 1)})


def _micro_batches(recipe: FullRecipe, world: int) -> list[int]:
    """Micro-batches that make up the global batch exactly, largest first.

    Where nothing is trained, they are what is scored at once, in prompts of `max_length`.
    """
    train = recipe.train
    if not recipe.method.trains:
        scored = recipe.evaluation.per_device_eval_batch_size
        most = max(1, MOST_SCORED_TOKENS // recipe.task.max_length)
        return doubling(most)[::-1] if scored == "auto" else [scored]
    if train.global_batch_size % world:
        return []
    each = train.global_batch_size // world
    sizes = [b for b in range(min(each, MAX_MICRO_BATCH), 0, -1) if each % b == 0]
    fixed = train.per_device_train_batch_size
    return sizes if fixed == "auto" else [b for b in [fixed] if each % b == 0]


def precision_of(recipe: FullRecipe, cluster: Cluster) -> Precision:
    """bf16 where the hardware has it, else fp16; fp32 on a CPU; or what the recipe says."""
    train = recipe.train
    if train.bf16 is True:
        return "bf16"
    if train.fp16 is True:
        return "fp16"
    if cluster.accelerator == "cpu" or (train.bf16 is False and train.fp16 is False):
        return "fp32"
    assert cluster.gpu is not None
    if train.bf16 != False and cluster.gpu.compute_capability >= BF16_CAPABILITY:  # noqa: E712
        return "bf16"
    return "fp32" if train.fp16 is False else "fp16"


def describe(layout: Layout) -> str:
    """A layout in a line: `2 nodes × 4 GPUs, ZeRO-3, micro-batch 1, checkpointing`."""
    parts = [
        f"{layout.nodes} node{'s' * (layout.nodes > 1)} × {layout.ranks_per_node}",
        f"ZeRO-{layout.zero_stage}" if layout.zero_stage else "no sharding",
        f"micro-batch {layout.per_device_train_batch_size}",
    ]
    if layout.gradient_checkpointing:
        parts.append("checkpointing")
    if layout.offload_optimizer != "none":
        parts.append(f"optimizer on {layout.offload_optimizer}")
    if layout.offload_param != "none":
        parts.append(f"parameters on {layout.offload_param}")
    if layout.loss_chunks > 1:
        parts.append(f"loss in {layout.loss_chunks} parts")
    return ", ".join(parts)
