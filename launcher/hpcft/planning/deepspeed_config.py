"""`ds_configs/*.json` and a layout make the final DeepSpeed configuration."""

from __future__ import annotations

import json
from typing import Any

from hpcft.core.errors import UsageError
from hpcft.core.paths import shipped
from hpcft.core.records import Cluster, Layout, ModelFacts, Precision, Train
from hpcft.planning.memory.model_states import swap_buffer_elements
from hpcft.planning.memory.zero_memory import zero_sizes

# DeepSpeed ignores a misspelt key silently, so templates may hold these only.
KNOWN_KEYS = {
    "bf16", "fp16", "zero_optimization", "gradient_clipping", "train_batch_size",
    "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "steps_per_print",
    "wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "communication_data_type", "data_types", "aio", "torch_autocast",
}  # fmt: skip
KNOWN_ZERO_KEYS = {
    "stage", "allgather_partitions", "allgather_bucket_size", "overlap_comm", "reduce_scatter",
    "reduce_bucket_size", "contiguous_gradients", "round_robin_gradients", "sub_group_size",
    "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold",
    "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "stage3_gather_16bit_weights_on_model_save", "offload_optimizer", "offload_param",
}  # fmt: skip


def build_deepspeed_config(
    layout: Layout, precision: Precision, facts: ModelFacts, train: Train, cluster: Cluster
) -> dict[str, Any] | None:
    """The DeepSpeed configuration of a layout; None where it does without DeepSpeed."""
    if layout.zero_stage == 0:
        return None
    config = _template(f"zero{layout.zero_stage}")
    zero = config["zero_optimization"]
    chosen = zero_sizes(facts, recomputes=layout.recomputes)
    zero["reduce_bucket_size"] = chosen.reduce_bucket_elements
    if layout.zero_stage < 3:
        zero["allgather_bucket_size"] = chosen.reduce_bucket_elements
    else:
        zero["stage3_prefetch_bucket_size"] = chosen.prefetch_bucket_elements
        zero["stage3_param_persistence_threshold"] = chosen.persistence_threshold_elements
        zero["stage3_max_live_parameters"] = chosen.max_live_elements
        zero["stage3_max_reuse_distance"] = chosen.max_reuse_distance_elements
        zero["sub_group_size"] = chosen.sub_group_elements
    for part, where in (
        ("offload_optimizer", layout.offload_optimizer),
        ("offload_param", layout.offload_param),
    ):
        if where != "none":
            zero[part] = _template(f"{part}_{where}")
            if where == "nvme":
                zero[part]["nvme_path"] = cluster.node_disk_path
    if layout.offload_param == "nvme":
        zero["offload_param"]["buffer_size"] = swap_buffer_elements(facts, layout)
    config["bf16"] = {"enabled": precision == "bf16"}
    config["fp16"] = {**config.get("fp16", {}), "enabled": precision == "fp16"}
    config["gradient_clipping"] = train.max_grad_norm
    config["train_micro_batch_size_per_gpu"] = layout.per_device_train_batch_size
    config["gradient_accumulation_steps"] = layout.gradient_accumulation_steps
    config["train_batch_size"] = (
        layout.per_device_train_batch_size * layout.gradient_accumulation_steps * layout.world_size
    )
    _check(config)
    return config


def _template(name: str) -> dict[str, Any]:
    file = shipped("ds_configs") / f"{name}.json"
    try:
        loaded: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: not a readable DeepSpeed template: {error}") from None
    return loaded


def _check(config: dict[str, Any]) -> None:
    unknown = set(config) - KNOWN_KEYS
    unknown |= {
        f"zero_optimization.{k}" for k in set(config["zero_optimization"]) - KNOWN_ZERO_KEYS
    }
    if unknown:
        raise UsageError(f"ds_configs: unknown keys {', '.join(sorted(unknown))}")
