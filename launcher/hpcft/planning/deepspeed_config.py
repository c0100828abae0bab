"""Builds the DeepSpeed configuration of a layout from the templates in `ds_configs/`."""

from __future__ import annotations

import json
from typing import Any

from hpcft.core.errors import UsageError
from hpcft.core.paths import shipped_folder
from hpcft.core.records import Layout
from hpcft.planning.inputs import PlanInputs
from hpcft.planning.memory.host_memory import swap_buffer_elements
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


def build_deepspeed_config(inputs: PlanInputs, layout: Layout) -> dict[str, Any] | None:
    """Returns the DeepSpeed configuration of a layout; None where DeepSpeed is not used.

    Raises:
        UsageError: a template cannot be read, or has a key that DeepSpeed does not know.
    """
    if layout.zero_stage == 0:
        return None
    config = _load_template(f"zero{layout.zero_stage}")
    config["zero_optimization"] |= _sizes(inputs, layout) | _offloading(inputs, layout)
    config["bf16"] = {"enabled": inputs.precision == "bf16"}
    config["fp16"] = {**config.get("fp16", {}), "enabled": inputs.precision == "fp16"}
    config["gradient_clipping"] = inputs.recipe.train.max_grad_norm
    config["train_micro_batch_size_per_gpu"] = layout.per_device_train_batch_size
    config["gradient_accumulation_steps"] = layout.gradient_accumulation_steps
    config["train_batch_size"] = layout.examples_per_step
    _check_keys(config)
    return config


def _sizes(inputs: PlanInputs, layout: Layout) -> dict[str, int]:
    sizes = zero_sizes(inputs.facts, layout)
    if layout.zero_stage < 3:
        return {
            "reduce_bucket_size": sizes.reduce_bucket_elements,
            "allgather_bucket_size": sizes.reduce_bucket_elements,
        }
    return {
        "reduce_bucket_size": sizes.reduce_bucket_elements,
        "stage3_prefetch_bucket_size": sizes.prefetch_bucket_elements,
        "stage3_param_persistence_threshold": sizes.persistence_threshold_elements,
        "stage3_max_live_parameters": sizes.max_live_elements,
        "stage3_max_reuse_distance": sizes.max_reuse_distance_elements,
        "sub_group_size": sizes.sub_group_elements,
    }


def _offloading(inputs: PlanInputs, layout: Layout) -> dict[str, Any]:
    places = {
        "offload_optimizer": layout.offload_optimizer,
        "offload_param": layout.offload_param,
    }
    sections = {
        part: _load_template(f"{part}_{place}") for part, place in places.items() if place != "none"
    }
    for part, section in sections.items():
        if places[part] == "nvme":
            section["nvme_path"] = inputs.cluster.node_disk_path
    if layout.offload_param == "nvme":
        sections["offload_param"]["buffer_size"] = swap_buffer_elements(inputs.facts, layout)
    return sections


def _load_template(name: str) -> dict[str, Any]:
    file = shipped_folder("ds_configs") / f"{name}.json"
    try:
        loaded: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: the DeepSpeed template cannot be read: {error}") from None
    return loaded


def _check_keys(config: dict[str, Any]) -> None:
    unknown = set(config) - KNOWN_KEYS
    unknown |= {
        f"zero_optimization.{k}" for k in set(config["zero_optimization"]) - KNOWN_ZERO_KEYS
    }
    if unknown:
        keys = ", ".join(sorted(unknown))
        raise UsageError(f"ds_configs: DeepSpeed does not know {keys}; correct the templates")
