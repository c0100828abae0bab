"""Plans of made-up recipes and models of round numbers: the search without a trace.

The memory of a step is a closed form here, so that tests are quick and their numbers are round;
`test_memory.py` has the traces of real modules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hpcft.config import cluster_profile
from hpcft.config.recipe_types import FullRecipe
from hpcft.core.records import Cluster, EvaluatedLayout, Layout, ModelFacts, ParameterCount, Plan
from hpcft.planning import planner
from hpcft.planning.memory.trace_types import KINDS, LinearBytes, StepMemory, TracedStep

BILLION = 1_000_000_000
NVME = {"node_disk_path": "/local", "node_disk_gib": 1000.0}


def cluster(name: str, **changes: Any) -> Cluster:
    """A shipped profile with fields changed."""
    return cluster_profile.load_profile(name).cluster.model_copy(update=changes)


CLASSIFY = {"name": "classification", "labels": ["a", "b"], "data": {"path": "x/y"}}
COMPLETE = {"name": "instruction", "prompt": "{q}", "completion": "{a}", "data": {"path": "x/y"}}


def recipe(**sections: Any) -> FullRecipe:
    """A recipe from its sections, with the rest made up."""
    made: dict[str, Any] = {"name": "made", "model": {"path": "x/y"}, "task": dict(CLASSIFY),
                            "method": {"name": "full"}, **sections}  # fmt: skip
    return FullRecipe.model_validate(made)


def facts(total: int = BILLION, **changes: Any) -> ModelFacts:
    """A decoder of round numbers; `trainable` and the like are its counts."""
    counted = {"trainable": total, "added": 0, "largest_layer": total // 10, "quantised": 0,
               "embedding_parameters": 0, "layer": total // 20, "largest_trained": total // 10}  # fmt: skip
    counts = {key: changes.pop(key, value) for key, value in counted.items()}
    shape: dict[str, Any] = {
        "model_type": "llama", "layers": 16, "hidden_size": 2048,
        "vocab_size": 32000, "logits_width": 32000,
        "max_positions": 4096,
    }  # fmt: skip
    return ModelFacts(parameters=ParameterCount(total=total, **counts), **(shape | changes))


def layout(stage: int, ranks: int = 1, **changes: Any) -> Layout:
    """One node of so many ranks."""
    fields: dict[str, Any] = {
        "nodes": 1, "ranks_per_node": ranks, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1, "gradient_checkpointing": False, "zero_stage": stage,
        "offload_optimizer": "none", "offload_param": "none",
    }  # fmt: skip
    return Layout(**(fields | changes))


def make(made: FullRecipe, site: Cluster, facts: ModelFacts, **options: Any) -> Plan:
    """The plan of a made-up model."""
    return planner.make_plan(made, site, facts, trace=lined(facts), **options)


def table(made: FullRecipe, site: Cluster, facts: ModelFacts) -> list[EvaluatedLayout]:
    """All layouts of a made-up model."""
    return planner.evaluate_all(made, site, facts, trace=lined(facts))


def lined(facts: ModelFacts) -> Callable[[TracedStep], StepMemory]:
    """A step in three moments: the end of the forward pass, the backward pass, the optimizer.

    Korthikanti et al. 2022 (arXiv:2205.05198, equation 1) count 34 B S H bytes a layer in 16 bits
    for F = 4 H, of which 16 of width F; with checkpointing a layer keeps 2 B S H.
    """
    p = facts.parameters

    def trace(step: TracedStep) -> StepMemory:
        width = 4 if step.precision == "fp32" else 2
        held = width if step.zero_stage else 4
        weights = 0 if step.zero_stage == 3 else held * p.trainable
        if step.zero_stage < 3:
            weights += width * (p.total - p.trainable - p.quantised) + p.quantised // 2
        gradients = 0 if step.zero_stage else 4 * p.trainable
        states = 0 if step.zero_stage else 8 * p.trainable
        layer = step.task.max_length * ((18 + 4 * 4) * facts.hidden_size)
        kept = 2 * step.task.max_length * facts.hidden_size
        each = kept * facts.layers + layer if step.checkpointing else layer * facts.layers
        logits = step.task.max_length * facts.logits_width * (width + 8)
        parts = logits // step.loss_chunks
        there = {"weights": weights, "optimizer states": states}
        behind = {**there, "gradients": gradients}
        if step.zero_stage in (1, 2):
            behind["gradient shards"] = width * p.trainable
        optimizer = {**there, "gradients": gradients}
        acts = each * width // 2
        return StepMemory(
            training=[
                _line("forward head", there, {"activations": acts, "logits and loss": parts}),
                _line("backward 0", behind, {"activations": acts // 4}),
                _line("optimizer", optimizer, {}),
            ],
            evaluation=[
                _line(
                    "evaluation head", there, {"activations": layer // 4, "logits and loss": parts}
                )
            ],
        )

    return trace


def _line(part: str, fixed: dict[str, int], each: dict[str, int]) -> LinearBytes:
    by_kind = [[sizes.get(kind, 0) for kind in KINDS] for sizes in (fixed, each)]
    return LinearBytes(part=part, fixed=by_kind[0], each=by_kind[1])
