"""Which layouts a recipe and a profile allow, and what the recipe asks in vain."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.records import Cluster, Layout, Precision

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


def allowed_layouts(
    recipe: FullRecipe, cluster: Cluster, *, supports_chunked_loss: bool = False
) -> Iterator[Layout]:
    """The layouts that recipe and profile allow; of one shape the least offloading first.

    Args:
        recipe: what to train.
        cluster: what there is.
        supports_chunked_loss: whether the model's loss can be computed in parts (`ModelFacts`).
    """
    wanted, train = recipe.resources, recipe.train
    most = cluster.gpus_per_node if cluster.accelerator == "cuda" else 1
    ranks = [wanted.gpus_per_node] if wanted.gpus_per_node != "auto" else powers_of_two(most)
    nodes = [wanted.nodes] if wanted.nodes != "auto" else powers_of_two(cluster.max_nodes)
    if wanted.gpus_per_node == "auto" and wanted.nodes != "auto" and wanted.nodes > 1:
        ranks = [most]  # who asks for several nodes means whole ones
    shapes = [(n, r) for n in nodes for r in ranks if n == 1 or r == ranks[-1]]
    trains = recipe.method.trains
    recomputing = train.gradient_checkpointing if trains else False
    checkpointing = [False, True] if recomputing == "auto" else [recomputing]
    chunks = LOSS_CHUNKS if supports_chunked_loss and trains else (1,)
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
            and not (stage and recipe.mode == "evaluate")
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


def powers_of_two(most: int) -> list[int]:
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
        return powers_of_two(most)[::-1] if scored == "auto" else [scored]
    if train.global_batch_size % world:
        return []
    each = train.global_batch_size // world
    sizes = [b for b in range(min(each, MAX_MICRO_BATCH), 0, -1) if each % b == 0]
    fixed = train.per_device_train_batch_size
    return sizes if fixed == "auto" else [b for b in [fixed] if each % b == 0]


def choose_precision(recipe: FullRecipe, cluster: Cluster) -> Precision:
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


def describe_layout(layout: Layout) -> str:
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
