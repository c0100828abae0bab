"""Estimates a case with DeepSpeed's and accelerate's own functions, for comparison.

Neither takes batch, sequence, activations or logits into account; both assume training with Adam.
For a model that is not trained accelerate gives its size.
"""

from __future__ import annotations

from typing import Any

from case import Case

from hpcft.config import hf_model


def deepspeed_bytes(case: Case) -> int | None:
    """Returns DeepSpeed's estimate per GPU without offloading, for ZeRO-3 or else for ZeRO-2.

    DeepSpeed has no estimate for one process without ZeRO; ZeRO-2 on one GPU is the closest. It has
    none for a model that is not trained: the result is then None.
    """
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    if case.task == "prompting":
        return None
    model = _on_meta(case)
    ranks = case.ranks if case.stage else 1
    total = sum(p.numel() for p in model.parameters())
    if case.stage == 3:
        largest = max(
            sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()
        )
        _, device, _ = estimate_zero3_model_states_mem_needs(
            total, largest, num_gpus_per_node=ranks, cpu_offload=False, cpu_offload_params=False
        )
    else:
        _, device = estimate_zero2_model_states_mem_needs(
            total, num_gpus_per_node=ranks, cpu_offload=False
        )
    return int(device)


def accelerate_bytes(case: Case) -> int:
    """Returns accelerate's «training using Adam»: four times the model in its type."""
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes

    total, _ = calculate_maximum_sizes(_on_meta(case))
    if case.task == "prompting":
        return int(total) if case.precision == "fp32" else int(total) // 2
    usage = estimate_training_usage(total, {"fp32": "float32", "bf16": "bfloat16"}[case.precision])
    return int(max(usage.values()))


def _on_meta(case: Case) -> Any:
    import torch

    recipe = case.recipe()
    config = hf_model.build_model_config(recipe.model, recipe.task)
    with torch.device("meta"):
        return hf_model.auto_model_class(recipe.task).from_config(config)
