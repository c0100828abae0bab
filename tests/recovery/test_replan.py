"""Tests of the last out-of-memory fallback: a plan on more nodes."""

from __future__ import annotations

from typing import Any

import pytest

import builders
from builders import CLASSIFY, small_site
from hpcft.config.recipe_types import FullRecipe
from hpcft.core.records import Cluster, Gpu, Layout, Plan
from hpcft.planning import model_facts, oom_fallback, planner
from hpcft.planning.inputs import PlanInputs
from hpcft.recovery.replan import plan_on_more_nodes

SMALL_MODEL = {"model_type": "bert", "vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 1,
               "num_attention_heads": 2, "intermediate_size": 64,
               "max_position_embeddings": 64}  # fmt: skip


def recipe(**sections: Any) -> FullRecipe:
    small = {"config": SMALL_MODEL, "tokenizer": {"vocab_size": 400}}
    short = CLASSIFY | {"max_length": 32}
    train = {"global_batch_size": 16}
    return builders.recipe(**({"model": small, "task": short, "train": train} | sections))


def smallest_layout(nodes: int, **changes: Any) -> Layout:
    """The layout of one rank per node that takes the least memory."""
    fields = {"gradient_accumulation_steps": 16 // nodes, "gradient_checkpointing": True}
    return builders.layout(0, nodes=nodes, **(fields | changes))


def plan_without_fallbacks(recipe: FullRecipe, cluster: Cluster, layout: Layout) -> Plan:
    """A plan of this layout, which no other fallback on the same nodes could change."""
    facts = model_facts.compute_model_facts(recipe.model, recipe.task, recipe.method)
    plan = planner.make_plan(PlanInputs(recipe, cluster, facts))
    plan = oom_fallback.with_layout(plan, layout, 1, recipe=recipe, cluster=cluster)
    assert oom_fallback.next_fallback(plan, recipe, cluster, "step") is None
    return plan


def test_plan_on_more_nodes_takes_more_nodes_until_the_profile_has_no_more() -> None:
    made, site = recipe(), small_site()
    plan: Plan | None = plan_without_fallbacks(made, site, smallest_layout(1))
    changes = []
    while plan is not None:
        wider = plan_on_more_nodes(plan, made, site)
        if wider is not None:
            layout = wider.layout
            assert layout.per_device_train_batch_size == 1
            assert layout.gradient_accumulation_steps * layout.world_size == 16
            assert layout.gradient_checkpointing
            assert layout.zero_stage >= max(plan.layout.zero_stage, 1)
            assert wider.per_device_eval_batch_size == 1
            assert wider.mem_mib >= plan.mem_mib, "the new job requests no less memory"
            assert wider.ds_config is not None
            assert wider.ds_config["train_batch_size"] == 16
            changes.append(oom_fallback.describe_change(plan, wider))
        plan = wider
    assert changes == ["1 → 2 nodes, no sharding → ZeRO-1, resubmitted", "2 → 4 nodes, resubmitted"]


@pytest.mark.parametrize(
    ("sections", "changes"),
    [
        ({"resources": {"nodes": 1}}, {}),  # The recipe fixes the nodes.
        ({"resources": {"zero_stage": 0}}, {}),  # Unsharded, each node would hold the whole model.
        ({}, {"max_nodes": 1}),
        ({}, {"scheduler": "local"}),
        ({"train": {"global_batch_size": 1}}, {}),  # Every rank needs an example.
    ],
)
def test_plan_on_more_nodes_returns_none_if_recipe_or_profile_forbid_them(
    sections: dict[str, Any], changes: dict[str, Any]
) -> None:
    made, site = recipe(**sections), small_site(**changes)
    batch = made.train.global_batch_size
    layout = smallest_layout(1, gradient_accumulation_steps=batch)
    assert plan_on_more_nodes(plan_without_fallbacks(made, site, layout), made, site) is None


def test_plan_on_more_nodes_uses_all_gpus_of_several_nodes() -> None:
    """The run had one of four GPUs of a node; it does not take one GPU of each of two nodes."""
    gpu = Gpu(name="A", memory_gib=40.0, compute_capability=8.0)
    site = small_site(accelerator="cuda", gpu=gpu, gpus_per_node=4, host_memory_gib=500.0)
    layout = smallest_layout(1, zero_stage=3, offload_optimizer="cpu", offload_param="cpu")
    made = recipe()
    before = plan_without_fallbacks(made, site, layout)
    after = plan_on_more_nodes(before, made, site)
    assert after is not None
    change = oom_fallback.describe_change(before, after)
    assert change == "1 → 2 nodes, 1 → 4 ranks on each, resubmitted"
    assert (after.layout.offload_optimizer, after.layout.offload_param) == ("cpu", "cpu")
