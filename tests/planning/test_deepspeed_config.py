"""Tests DeepSpeed configurations against golden files and the keys that DeepSpeed reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from builders import check_golden, recipe
from hpcft.core.errors import UsageError
from hpcft.core.records import Cluster, Gpu, Layout, ModelFacts, ParameterCount, Precision
from hpcft.planning import deepspeed_config
from hpcft.planning.inputs import PlanInputs

FACTS = ModelFacts(
    model_type="llama",
    parameters=ParameterCount(total=8_000_000_000, trainable=8_000_000_000, added=0,
                              largest_layer=525_336_576),
    layers=32, hidden_size=4096, vocab_size=128256,
    logits_width=128256, max_positions=8192,
)  # fmt: skip


def layout(**changes: Any) -> Layout:
    """Returns ZeRO-3 on two nodes of four ranks."""
    fields: dict[str, Any] = {
        "nodes": 2, "ranks_per_node": 4, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4, "gradient_checkpointing": True, "zero_stage": 3,
        "offload_optimizer": "none", "offload_param": "none",
    }  # fmt: skip
    return Layout(**(fields | changes))


def inputs(precision: Precision = "bf16") -> PlanInputs:
    """Returns a model of 8 B parameters on a cluster whose nodes have a disk."""
    cluster = Cluster(
        name="site", scheduler="slurm", accelerator="cuda", partition="gpu", max_nodes=8,
        gpus_per_node=4, cores_per_node=48, host_memory_gib=480.0,
        gpu=Gpu(name="A100", memory_gib=39.4, compute_capability=8.0),
        node_disk_path="/local/scratch",
    )  # fmt: skip
    return PlanInputs(recipe(), cluster, FACTS, fixed_precision=precision)


CONFIGS: dict[str, tuple[dict[str, Any], Precision]] = {
    "zero1": ({"zero_stage": 1}, "bf16"),
    "zero2": ({"zero_stage": 2}, "fp16"),
    "zero2-cpu": ({"zero_stage": 2, "offload_optimizer": "cpu"}, "bf16"),
    "zero3": ({}, "bf16"),
    "zero3-fp32": ({}, "fp32"),
    "zero3-cpu": ({"offload_optimizer": "cpu", "offload_param": "cpu"}, "bf16"),
    "zero3-nvme": ({"offload_optimizer": "nvme", "offload_param": "nvme"}, "bf16"),
}


def config(name: str) -> dict[str, Any]:
    """Returns one of the configurations above."""
    changes, precision = CONFIGS[name]
    built = deepspeed_config.build_deepspeed_config(inputs(precision), layout(**changes))
    assert built is not None
    return built


@pytest.mark.parametrize("name", CONFIGS)
def test_build_deepspeed_config_writes_the_golden_file(name: str) -> None:
    check_golden(f"deepspeed-{name}.json", json.dumps(config(name), indent=2) + "\n")


def test_build_deepspeed_config_without_sharding_returns_none() -> None:
    assert deepspeed_config.build_deepspeed_config(inputs(), layout(zero_stage=0)) is None


def test_build_deepspeed_config_for_nvme_makes_buffers_as_large_as_the_largest_shard() -> None:
    """DeepSpeed ends with an assertion where a rank's share of a layer exceeds the buffer."""
    nvme = {"offload_optimizer": "nvme", "offload_param": "nvme"}
    for ranks, expected in ((1, 525_336_576), (4, 131_334_144), (8, 100_000_000)):
        built = deepspeed_config.build_deepspeed_config(
            inputs(), layout(nodes=1, ranks_per_node=ranks, **nvme)
        )
        assert built is not None
        assert built["zero_optimization"]["offload_param"]["buffer_size"] == expected


def test_build_deepspeed_config_batch_sizes_agree() -> None:
    built = config("zero3")
    assert built["train_micro_batch_size_per_gpu"] * built["gradient_accumulation_steps"] * 8 == 32
    assert built["train_batch_size"] == 32


@pytest.mark.parametrize("name", CONFIGS)
def test_build_deepspeed_config_has_only_keys_that_deepspeed_reads(name: str) -> None:
    """DeepSpeed ignores a misspelt key, so ours are compared with what its own code reads."""
    from deepspeed.runtime import config as runtime
    from deepspeed.runtime import constants
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.swap_tensor import constants as swap
    from deepspeed.runtime.zero import config as zero
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    built = config(name)
    names = {value for module in (runtime, constants, zero, swap) for value in vars(module).values()
             if isinstance(value, str)}  # fmt: skip
    assert set(built) <= names
    parts: list[tuple[Any, dict[str, Any]]] = [
        (DeepSpeedZeroConfig, built["zero_optimization"]),
        (DeepSpeedFP16Config, built["fp16"]),
        (DeepSpeedBF16Config, built["bf16"]),
        (DeepSpeedZeroOffloadOptimizerConfig, built["zero_optimization"].get("offload_optimizer")),
        (DeepSpeedZeroOffloadParamConfig, built["zero_optimization"].get("offload_param")),
    ]
    for kind, values in parts:
        fields = kind.model_fields
        known = {field.alias or key for key, field in fields.items()} | set(fields)
        assert set(values or {}) <= known, kind.__name__
    allowed = {field.alias or key for key, field in DeepSpeedZeroConfig.model_fields.items()}
    assert allowed >= deepspeed_config.KNOWN_ZERO_KEYS
    assert names >= deepspeed_config.KNOWN_KEYS


def test_build_deepspeed_config_refuses_a_misspelt_key_in_a_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = {"zero_optimization": {"stage": 1, "overlap_com": True}, "steps_per_prnt": 1}
    (tmp_path / "zero1.json").write_text(json.dumps(template))
    monkeypatch.setattr(deepspeed_config, "shipped_folder", lambda kind: tmp_path)
    with pytest.raises(UsageError, match=r"steps_per_prnt, zero_optimization\.overlap_com"):
        deepspeed_config.build_deepspeed_config(inputs(), layout(zero_stage=1))
