"""What is written for Slurm and DeepSpeed, against golden files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from builders import ROOT
from hpcft.core.errors import UsageError
from hpcft.core.log_markers import SETUP_BEGINS, SETUP_ENDS
from hpcft.core.records import Cluster, Gpu, Layout, ModelFacts, ParameterCount, Plan, Train
from hpcft.planning import deepspeed_config
from hpcft.scheduler import slurm

GOLDEN = ROOT / "tests" / "golden"
PYTHON = "/opt/hpcft/bin/python"


def same(name: str, text: str) -> None:
    """Compares with a golden file; `HPCFT_GOLDEN=write` rewrites it, for `git diff` to judge."""
    file = GOLDEN / name
    if os.environ.get("HPCFT_GOLDEN") == "write":
        file.write_text(text)
    assert text == file.read_text()


FACTS = ModelFacts(
    model_type="llama",
    parameters=ParameterCount(total=8_000_000_000, trainable=8_000_000_000, added=0,
                              largest_layer=525_336_576),
    layers=32, hidden_size=4096, vocab_size=128256,
    logits_width=128256, max_positions=8192,
)  # fmt: skip


def layout(**changes: Any) -> Layout:
    fields: dict[str, Any] = {
        "nodes": 2, "ranks_per_node": 4, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4, "gradient_checkpointing": True, "zero_stage": 3,
        "offload_optimizer": "none", "offload_param": "none",
    }  # fmt: skip
    return Layout(**(fields | changes))


def plan(**changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "recipe": "made", "cluster": "site", "accelerator": "cuda", "layout": layout(),
        "precision": "bf16", "optim": "adamw_torch", "per_device_eval_batch_size": 4,
        "facts": FACTS, "gpu_memory": [], "gpu_capacity_bytes": 1, "host_memory": [],
        "host_capacity_bytes": 1, "cpus_per_task": 12, "mem_mib": 49152, "time_min": 90,
        "partition": "gpu",
    }  # fmt: skip
    return Plan(**(fields | changes))


def site(**changes: Any) -> Cluster:
    fields: dict[str, Any] = {
        "name": "site", "scheduler": "slurm", "accelerator": "cuda", "partition": "gpu",
        "max_nodes": 8, "gpus_per_node": 4, "cores_per_node": 48, "host_memory_gib": 480.0,
        "gpu": Gpu(name="A100", memory_gib=39.4, compute_capability=8.0),
    }  # fmt: skip
    return Cluster(**(fields | changes))


# ---------------------------------------------------------------- sbatch scripts


TYPED = Gpu(name="A100", type="a100", memory_gib=39.4, compute_capability=8.0)
SCRIPTS: dict[str, tuple[dict[str, Any], int]] = {
    "single": ({}, 1),
    "array": ({"account": "project_1", "qos": "long"}, 6),
    "gres": ({"gpu_request": "gres"}, 1),
    "typed-gpus": ({"gpu": TYPED}, 1),
    "typed-gres": ({"gpu": TYPED, "gpu_request": "gres"}, 1),
    "no-gpus": ({"gpu_request": "none", "constraint": "[rack1|rack2]"}, 1),
    "setup": (
        {"setup": ["module load cuda/13.0", "source '/shared/my venv/bin/activate'"],
         "environment": {"NCCL_SOCKET_IFNAME": "ib0", "ODD": "it's $HOME; `x`"}},
        1,
    ),
    "container": (
        {"python": "apptainer exec --nv /shared/hpcft.sif python",
         "srun_args": ["--container-image=/shared/a b.sqsh", "--cpu-bind=none"]},
        1,
    ),
}  # fmt: skip


def script(changes: dict[str, Any], count: int, folder: Path) -> str:
    cluster = site(**changes)
    options = slurm.job_parameters(cluster, plan(), "made", "hpcft-0123456789ab-0-89abcdef")
    return slurm.sbatch_script(folder, options, cluster, count)


@pytest.mark.parametrize("name", SCRIPTS)
def test_sbatch_script(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", PYTHON)
    text = script(*SCRIPTS[name], Path("/scratch/ünï 'x'/runs/made/0123456789ab/logs"))
    same(f"sbatch-{name}.sh", text)
    checked = subprocess.run(
        ["bash", "-n"], input=text, text=True, capture_output=True, check=False
    )
    assert checked.returncode == 0, checked.stderr


def test_setup_that_fails_stops_the_job(tmp_path: Path) -> None:
    """A `module load` that fails must not go unnoticed; what follows it tolerates failure."""
    cluster = site(setup=["false"], environment={"SPACED": "a 'b' $c"})
    lines = slurm.job_parameters(cluster, plan(), "made", "t")["setup"]
    failing = subprocess.run(["bash", "-c", "\n".join([*lines, "echo reached"])], check=False,
                             capture_output=True, text=True)  # fmt: skip
    assert (failing.returncode, failing.stdout) == (1, "")
    assert failing.stderr == f"{SETUP_BEGINS}\n", "nothing but that it began"
    good = slurm.job_parameters(
        site(setup=["true"], environment=cluster.environment), plan(), "m", "t"
    )
    text = "\n".join([*good["setup"], "false", 'echo "$SPACED"'])
    passing = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=False)
    assert passing.stdout == "a 'b' $c\n"
    assert passing.stderr == f"{SETUP_BEGINS}\n{SETUP_ENDS}\n"


# ---------------------------------------------------------------- DeepSpeed JSON


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "zero1": ({"zero_stage": 1}, "bf16"),
    "zero2": ({"zero_stage": 2}, "fp16"),
    "zero2-cpu": ({"zero_stage": 2, "offload_optimizer": "cpu"}, "bf16"),
    "zero3": ({}, "bf16"),
    "zero3-fp32": ({}, "fp32"),
    "zero3-cpu": ({"offload_optimizer": "cpu", "offload_param": "cpu"}, "bf16"),
    "zero3-nvme": ({"offload_optimizer": "nvme", "offload_param": "nvme"}, "bf16"),
}


def config(name: str) -> dict[str, Any]:
    changes, precision = CONFIGS[name]
    built = deepspeed_config.build_deepspeed_config(
        layout(**changes), precision, FACTS, Train(), site(node_disk_path="/local/scratch")
    )
    assert built is not None
    return built


@pytest.mark.parametrize("name", CONFIGS)
def test_deepspeed_config(name: str) -> None:
    same(f"deepspeed-{name}.json", json.dumps(config(name), indent=2) + "\n")


def test_no_deepspeed_without_sharding() -> None:
    assert (
        deepspeed_config.build_deepspeed_config(
            layout(zero_stage=0), "bf16", FACTS, Train(), site()
        )
        is None
    )


def test_parameters_on_nvme_have_buffers_that_hold_the_largest() -> None:
    """DeepSpeed ends with an assertion where a rank's share of a layer exceeds the buffer."""
    disk = site(node_disk_path="/local")
    moved = {"offload_optimizer": "nvme", "offload_param": "nvme"}
    for ranks, expected in ((1, 525_336_576), (4, 131_334_144), (8, 100_000_000)):
        laid = layout(nodes=1, ranks_per_node=ranks, **moved)
        built = deepspeed_config.build_deepspeed_config(laid, "bf16", FACTS, Train(), disk)
        assert built is not None
        assert built["zero_optimization"]["offload_param"]["buffer_size"] == expected


def test_batch_sizes_agree() -> None:
    built = config("zero3")
    assert built["train_micro_batch_size_per_gpu"] * built["gradient_accumulation_steps"] * 8 == 32
    assert built["train_batch_size"] == 32


@pytest.mark.parametrize("name", CONFIGS)
def test_deepspeed_knows_every_key(name: str) -> None:
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


def test_a_misspelt_key_in_a_template_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = {"zero_optimization": {"stage": 1, "overlap_com": True}, "steps_per_prnt": 1}
    (tmp_path / "zero1.json").write_text(json.dumps(template))
    monkeypatch.setattr(deepspeed_config, "shipped", lambda kind: tmp_path)
    with pytest.raises(UsageError, match=r"steps_per_prnt, zero_optimization\.overlap_com"):
        deepspeed_config.build_deepspeed_config(
            layout(zero_stage=1), "bf16", FACTS, Train(), site()
        )
