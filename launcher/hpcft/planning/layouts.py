"""Lists the layouts that a recipe and a profile allow, and describes a layout in words."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.records import Cluster, Layout, Offload

MAX_MICRO_BATCH = 64
MAX_SCORED_TOKENS = 16_384  # a GPU is busy with these; larger batches gain nothing
LOSS_CHUNKS = (1, 8)  # numbers of parts to compute the loss in that are tried


class Sharding(NamedTuple):
    """A ZeRO stage with the places of optimizer and parameters."""

    zero_stage: int
    """DeepSpeed ZeRO stage; 0 is plain data parallelism."""
    offload_optimizer: Offload
    """Where the optimizer's states are."""
    offload_param: Offload
    """Where the parameters are between uses."""

    @property
    def is_offloading(self) -> bool:
        """Whether anything is moved off the device."""
        return (self.offload_optimizer, self.offload_param) != ("none", "none")


# In the order of what they cost in speed.
SHARDINGS = (
    Sharding(0, "none", "none"),
    Sharding(1, "none", "none"),
    Sharding(2, "none", "none"),
    Sharding(3, "none", "none"),
    Sharding(3, "none", "cpu"),
    Sharding(2, "cpu", "none"),
    Sharding(3, "cpu", "none"),
    Sharding(3, "cpu", "cpu"),
    Sharding(3, "nvme", "none"),
    Sharding(3, "nvme", "nvme"),
)


def allowed_layouts(
    recipe: FullRecipe, cluster: Cluster, *, supports_chunked_loss: bool = False
) -> Iterator[Layout]:
    """Yields the layouts that recipe and profile allow; within a shape by cost in speed.

    Args:
        recipe: the recipe.
        cluster: the profile.
        supports_chunked_loss: whether the model's loss can be computed in parts (`ModelFacts`).
    """
    train, trains = recipe.train, recipe.method.trains
    fixed = train.gradient_checkpointing if trains else False
    checkpointing = [False, True] if fixed == "auto" else [fixed]
    chunks = LOSS_CHUNKS if supports_chunked_loss and trains else (1,)
    shapes, shardings = _shapes(recipe, cluster), list(allowed_shardings(recipe, cluster))
    for (nodes, ranks), sharding in itertools.product(shapes, shardings):
        if _is_pointless(sharding, recipe, nodes * ranks):
            continue
        for recomputes, loss_chunks in itertools.product(checkpointing, chunks):
            for micro in _micro_batches(recipe, nodes * ranks):
                global_micro = micro * nodes * ranks
                yield Layout(
                    nodes=nodes,
                    ranks_per_node=ranks,
                    per_device_train_batch_size=micro,
                    gradient_accumulation_steps=train.global_batch_size // global_micro
                    if trains
                    else 1,
                    gradient_checkpointing=recomputes,
                    zero_stage=sharding.zero_stage,
                    offload_optimizer=sharding.offload_optimizer,
                    offload_param=sharding.offload_param,
                    loss_chunks=loss_chunks,
                )


def _shapes(recipe: FullRecipe, cluster: Cluster) -> list[tuple[int, int]]:
    """Returns the numbers of nodes and of ranks on each that recipe and profile allow."""
    requested = recipe.resources
    per_node = cluster.gpus_per_node if cluster.accelerator == "cuda" else 1
    ranks = powers_of_two(per_node)
    if requested.gpus_per_node != "auto":
        ranks = [requested.gpus_per_node]
    elif requested.nodes != "auto" and requested.nodes > 1:
        ranks = [per_node]  # A recipe that asks for several nodes means whole ones.
    nodes = powers_of_two(cluster.max_nodes) if requested.nodes == "auto" else [requested.nodes]
    return [(n, r) for n in nodes for r in ranks if n == 1 or r == ranks[-1]]


def allowed_shardings(recipe: FullRecipe, cluster: Cluster) -> Iterator[Sharding]:
    """Yields the combinations of ZeRO stage and offloading that recipe and profile allow."""
    for sharding in SHARDINGS:
        if _recipe_allows(sharding, recipe) and _device_allows(sharding, recipe, cluster):
            yield sharding


def _recipe_allows(sharding: Sharding, recipe: FullRecipe) -> bool:
    stage, optimizer, param = sharding
    requested, trains = recipe.resources, recipe.method.trains
    return (
        stage in recipe.method.zero_stages
        # The Trainer scores a trained model, and it shards for training only.
        and not (stage and recipe.mode == "evaluate")
        and requested.zero_stage in ("auto", stage)
        and requested.offload_optimizer in ("auto", optimizer)
        and requested.offload_param in ("auto", param)
        # Offloading runs DeepSpeed's own CPU Adam.
        and (
            not sharding.is_offloading or recipe.train.optim in ("adamw_torch", "adamw_torch_fused")
        )
        # Parameters are offloaded only together with the optimizer, if the method has one.
        and (param == "none" or (optimizer != "none") == trains)
        and (trains or optimizer == "none")
    )


def _device_allows(sharding: Sharding, recipe: FullRecipe, cluster: Cluster) -> bool:
    """Returns whether there are the places to offload to, and something is gained by it."""
    _, optimizer, param = sharding
    if "nvme" in (optimizer, param) and cluster.node_disk_path is None:
        return False
    # A CPU gains nothing from offloading, which it does only where the recipe asks for it.
    requested = recipe.resources
    moves = [(optimizer, requested.offload_optimizer), (param, requested.offload_param)]
    is_requested = all(wanted != "auto" for place, wanted in moves if place != "none")
    return cluster.accelerator == "cuda" or is_requested


def _is_pointless(sharding: Sharding, recipe: FullRecipe, ranks: int) -> bool:
    """Returns whether a layout would shard over one rank, which gains nothing, unrequested."""
    is_requested = recipe.resources.zero_stage != "auto"
    gains = ranks > 1 or sharding.is_offloading
    return sharding.zero_stage > 0 and not gains and not is_requested


def powers_of_two(limit: int) -> list[int]:
    """Returns 1, 2, 4, … up to `limit`, and `limit` itself."""
    return sorted({min(2**power, limit) for power in range(limit.bit_length() + 1)})


def _micro_batches(recipe: FullRecipe, ranks: int) -> list[int]:
    """Returns the micro-batches that make up the global batch exactly, the largest first.

    Where nothing is trained, they are the examples that are scored at once, of `max_length` tokens.
    """
    train = recipe.train
    if not recipe.method.trains:
        scored = recipe.evaluation.per_device_eval_batch_size
        limit = max(1, MAX_SCORED_TOKENS // recipe.task.max_length)
        return powers_of_two(limit)[::-1] if scored == "auto" else [scored]
    if train.global_batch_size % ranks:
        return []
    per_rank = train.global_batch_size // ranks
    fixed = train.per_device_train_batch_size
    if fixed != "auto":
        return [] if per_rank % fixed else [fixed]
    return [b for b in range(min(per_rank, MAX_MICRO_BATCH), 0, -1) if per_rank % b == 0]


def describe_layout(layout: Layout) -> str:
    """Returns a layout in a line: `2 nodes × 4, ZeRO-3, micro-batch 1, checkpointing`."""
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
