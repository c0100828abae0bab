"""What others estimate for a case: DeepSpeed's and accelerate's own functions, as they stand.

Neither knows batch, sequence, activations or logits; both answer for training with Adam. Of a model
that is not trained accelerate tells the size.
"""

from __future__ import annotations

from typing import Any

from case import Case

from hpcft.config import hf_model


def deepspeed_bytes(case: Case) -> int | None:
    """DeepSpeed's estimate for a GPU: ZeRO-3's where the case has it, else ZeRO-2's; no offloading.

    It offers none for one process without ZeRO; that of ZeRO-2 on one GPU is the closest. For a
    model that is not trained nothing is.
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
    """The «training using Adam» that accelerate prints, four times the model in its type."""
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
