"""What is written for Slurm and DeepSpeed, and what is read from Slurm: golden files, samples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from hpcft import ds_config
from hpcft.cluster import profile, slurm
from hpcft.cluster.states import JobState, explained, normalised
from hpcft.errors import ClusterError, UsageError
from hpcft.records import Cluster, Gpu, Layout, ModelFacts, ParameterCount, Plan, Train

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
    layers=32, hidden_size=4096, intermediate_size=14336, attention_heads=32, vocab_size=128256,
    logits_width=128256, logits_positions="tokens", max_positions=8192,
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
    options = slurm.parameters(cluster, plan(), "made", "hpcft-0123456789ab-0-89abcdef")
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
    lines = slurm.parameters(cluster, plan(), "made", "t")["setup"]
    failing = subprocess.run(["bash", "-c", "\n".join([*lines, "echo reached"])], check=False,
                             capture_output=True, text=True)  # fmt: skip
    assert (failing.returncode, failing.stdout) == (1, "")
    good = slurm.parameters(site(setup=["true"], environment=cluster.environment), plan(), "m", "t")
    text = "\n".join([*good["setup"], "false", 'echo "$SPACED"'])
    passing = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=False)
    assert passing.stdout == "a 'b' $c\n"


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
    built = ds_config.build(
        layout(**changes), precision, FACTS, Train(), site(node_disk_path="/local/scratch")
    )
    assert built is not None
    return built


@pytest.mark.parametrize("name", CONFIGS)
def test_deepspeed_config(name: str) -> None:
    same(f"deepspeed-{name}.json", json.dumps(config(name), indent=2) + "\n")


def test_no_deepspeed_without_sharding() -> None:
    assert ds_config.build(layout(zero_stage=0), "bf16", FACTS, Train(), site()) is None


def test_parameters_on_nvme_have_buffers_that_hold_the_largest() -> None:
    """DeepSpeed ends with an assertion where a rank's share of a layer exceeds the buffer."""
    disk = site(node_disk_path="/local")
    moved = {"offload_optimizer": "nvme", "offload_param": "nvme"}
    for ranks, expected in ((1, 525_336_576), (4, 131_334_144), (8, 100_000_000)):
        laid = layout(nodes=1, ranks_per_node=ranks, **moved)
        built = ds_config.build(laid, "bf16", FACTS, Train(), disk)
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
    assert allowed >= ds_config.KNOWN_ZERO_KEYS
    assert names >= ds_config.KNOWN_KEYS


def test_a_misspelt_key_in_a_template_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = {"zero_optimization": {"stage": 1, "overlap_com": True}, "steps_per_prnt": 1}
    (tmp_path / "zero1.json").write_text(json.dumps(template))
    monkeypatch.setattr(ds_config, "shipped", lambda kind: tmp_path)
    with pytest.raises(UsageError, match=r"steps_per_prnt, zero_optimization\.overlap_com"):
        ds_config.build(layout(zero_stage=1), "bf16", FACTS, Train(), site())


# ---------------------------------------------------------------- reading Slurm


SQUEUE = """\
101|RUNNING|1-02:03:04|n[1-2]|None
102|PENDING|0:00||Resources
103|PENDING|0:00||(Priority)
104_0|RUNNING|5:06|n3|None
104_1|PENDING|0:00||JobArrayTaskLimit
104_10|PENDING|0:00||Dependency
105|PENDING|0:00||ReqNodeNotAvail, UnavailableNodes:n[1-2]
106|PENDING|0:00||Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions
107|CONFIGURING|0:03|n4|Prolog
108|COMPLETING|0:10|n4|None
109|NODE_FAIL|2:00|n1|NodeDown
110|CANCELLED|0:00||None
111|PENDING|0:00||SomethingNew(1|2)
112|REQUEUE_HOLD|0:00||launch failed requeued held
999|RUNNING|0:01|n1|None
"""  # noqa: E501
WANTED = {"101", "102", "103", "104_0", "104_1", "104_10", "105", "106", "107", "108", "109", "110",
          "111", "112", "404"}  # fmt: skip


def test_squeue() -> None:
    found = slurm.parse_squeue(SQUEUE, WANTED)
    assert set(found) == WANTED - {"404"}
    assert found["101"] == JobState("RUNNING", "", "n[1-2]", 93784.0)
    assert found["102"].reason == "waiting for nodes to become free (Resources)"
    assert found["103"].reason == "jobs of higher priority are ahead (Priority)"
    assert (found["104_0"].state, found["104_0"].elapsed_s) == ("RUNNING", 306.0)
    assert found["104_1"].reason.startswith("waiting for other points of the sweep")
    assert found["105"].reason == (
        "a node that it needs is down or reserved (ReqNodeNotAvail, UnavailableNodes:n[1-2])"
    )
    assert found["106"].reason.startswith("the nodes that it needs are down, drained or reserved")
    assert found["111"].reason == "SomethingNew(1|2)"
    assert found["112"].reason.startswith("could not start on its node and is held")
    live = {name for name, state in found.items() if state.is_live}
    assert live == WANTED - {"404", "109", "110"}
    assert {name for name, state in found.items() if state.is_over} == {"109", "110"}


SACCT = """\
201|COMPLETED|0:0|00:01:02|n1
202|CANCELLED by 0|0:15|1-02:03:04|n[1-4]
203|CANCELLED+|0:0|00:00:00|None assigned
204|TIMEOUT|0:0|01:00:00|n2
205|OUT_OF_MEMORY|0:125|00:02:00|n2
206|NODE_FAIL|1:0|00:00:30|n3
207_0|FAILED|1:0|00:00:10|n1
207_1|COMPLETED|0:0|00:00:11|n1
207_[2-3,5%2]|PENDING|0:0|00:00:00|None assigned
208|PREEMPTED|0:15|00:09:00|n1
209|RUNNING|0:0|02:03.500|n1
210|FAILED|
"""


def test_sacct() -> None:
    wanted = {str(n) for n in (201, 202, 203, 204, 205, 206, 208, 209, 210)}
    wanted |= {f"207_{n}" for n in range(6)}
    found = slurm.parse_sacct(SACCT, wanted)
    assert {name: state.state for name, state in found.items()} == {
        "201": "COMPLETED", "202": "CANCELLED", "203": "CANCELLED", "204": "TIMEOUT",
        "205": "OUT_OF_MEMORY", "206": "NODE_FAIL", "207_0": "FAILED", "207_1": "COMPLETED",
        "207_2": "PENDING", "207_3": "PENDING", "207_5": "PENDING", "208": "PREEMPTED",
        "209": "RUNNING", "210": "FAILED",
    }  # fmt: skip
    assert found["202"] == JobState("CANCELLED", "", "n[1-4]", 93784.0, "0:15")
    assert found["209"].elapsed_s == 123.0
    assert found["210"].elapsed_s is None
    over = {name for name, state in found.items() if state.is_over}
    assert over == set(found) - {"207_2", "207_3", "207_5", "209"}


@pytest.mark.parametrize(
    ("word", "plain"),
    [("CANCELLED by 1000", "CANCELLED"), ("CANCELLED+", "CANCELLED"), (" running ", "RUNNING"),
     ("OUT_OF_ME+", "OUT_OF_ME"), ("", "UNKNOWN"), ("+", "UNKNOWN")],
)  # fmt: skip
def test_normalised(word: str, plain: str) -> None:
    assert normalised(word) == plain


@pytest.mark.parametrize(
    ("reason", "sentence"),
    [
        ("None", ""),
        ("", ""),
        ("(None)", ""),
        ("(Resources)", "waiting for nodes to become free (Resources)"),
        ("PartitionTimeLimit", "asks for more time than the partition allows: lower "
         "resources.time_min (PartitionTimeLimit)"),
        ("Nodes_required_for_job_are_DOWN,_DRAINED", "the nodes that it needs are down, "
         "drained or reserved (Nodes_required_for_job_are_DOWN,_DRAINED)"),
        ("launch_failed_requeued_held", "could not start on its node and is held: scontrol release "
         "(launch_failed_requeued_held)"),
        ("ReqNodeNotAvail(Unavailable:n1)", "ReqNodeNotAvail(Unavailable:n1)"),
        ("Unheard", "Unheard"),
    ],
)  # fmt: skip
def test_pending_reasons(reason: str, sentence: str) -> None:
    assert explained(reason) == sentence


def scheduler(monkeypatch: pytest.MonkeyPatch, **answers: str | Exception) -> list[str]:
    """Puts made-up answers where scheduler commands would be; the commands that were called."""
    called: list[str] = []

    def run(*command: str, timeout_s: float = 0) -> str:
        called.append(" ".join(command))
        answer = answers[command[0]]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(slurm, "_run", run)
    return called


AWAY = ClusterError("squeue failed (1): slurm_load_jobs error: Unable to contact slurm controller")
NO_ACCOUNTS = ClusterError("sacct failed (1): Slurm accounting storage is disabled")


def test_states_ask_each_command_once(monkeypatch: pytest.MonkeyPatch) -> None:
    called = scheduler(monkeypatch, squeue=SQUEUE, sacct=SACCT)
    found = slurm.states(["101", "104_1", "201", "207_0", "207_1"])
    assert [state.state for state in found.values()] == [
        "RUNNING", "PENDING", "COMPLETED", "FAILED", "COMPLETED",
    ]  # fmt: skip
    assert len(called) == 2
    assert "-j 201,207 " in called[1]
    assert slurm.states([]) == {}
    assert len(called) == 2


def test_states_without_the_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler(monkeypatch, squeue=AWAY, sacct=SACCT)
    found = slurm.states(["101", "204"])
    assert found["204"].state == "TIMEOUT"
    assert found["101"] == JobState("UNKNOWN", str(AWAY))


def test_states_without_accounting(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler(monkeypatch, squeue=SQUEUE, sacct=NO_ACCOUNTS)
    found = slurm.states(["101", "204"])
    assert found["101"].state == "RUNNING"
    assert found["204"] == JobState("UNKNOWN", str(NO_ACCOUNTS))


def test_states_without_either(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler(monkeypatch, squeue=AWAY, sacct=NO_ACCOUNTS)
    found = slurm.states(["101", "204"])
    assert {state.state for state in found.values()} == {"UNKNOWN"}
    assert {state.reason for state in found.values()} == {f"{AWAY}; {NO_ACCOUNTS}"}
    assert not any(state.is_over or state.is_live for state in found.values())


def test_states_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler(monkeypatch, squeue="", sacct="")
    (state,) = slurm.states(["77"]).values()
    assert state == JobState("UNKNOWN", "neither squeue nor sacct knows the job")


def test_a_job_is_found_by_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "5|hpcft-a\n6_0|hpcft-b\n6_1|hpcft-b\n6_11|hpcft-b\n7|\n"
    scheduler(monkeypatch, squeue=lines)
    assert slurm.find_by_token("hpcft-a") == "5"
    assert slurm.find_by_token("hpcft-b", 1) == "6_1"
    assert slurm.find_by_token("hpcft-b", 11) == "6_11"
    assert slurm.find_by_token("hpcft-c") is None


@pytest.mark.parametrize(
    ("body", "says"),
    [("exit 3", r"failed \(3\)"), ("echo no luck >&2; exit 1", "no luck"),
     ("echo only out; exit 1", "only out"), ("sleep 30", "did not answer within 1 s")],
)  # fmt: skip
def test_a_scheduler_command_that_fails(
    body: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "squeue"
    command.write_text(f"#!/bin/sh\n{body.replace('sleep', 'exec sleep')}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(ClusterError, match=f"squeue .*{says}"):
        slurm._run("squeue", timeout_s=1)


def test_a_scheduler_command_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ClusterError, match="squeue is not on PATH: is this a Slurm login node"):
        slurm.find_by_token("x")


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("reason", "key"),
    [
        ("Invalid account or account/partition combination specified", "account"),
        ("Invalid partition name specified", "partition"),
        ("User's group not permitted to use this partition", "partition"),
        ("Invalid qos specification", "qos"),
        ("Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
         "qos"),
        ("Invalid feature specification", "constraint"),
        ("Requested time limit is invalid (missing or exceeds some limit)", "time_limit_min"),
        ("Memory required by task is not available", "host_memory_gib"),
        ("Requested node configuration is not available", "gpus_per_node"),
        ("Node count specification invalid", "max_nodes"),
        ("More processors requested than permitted", "cores_per_node"),
        ("CPU count per node can not be satisfied", "cores_per_node"),
        ("Invalid generic resource (gres) specification", "gpu_request"),
        ("Invalid Trackable RESource (TRES) specification", "gpu_request"),
        ("Something that nobody has seen", "name"),
    ],
)  # fmt: skip
def test_refusals_name_the_field_to_blame(
    reason: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = ClusterError(f"sbatch failed (1): sbatch: error: x\nallocation failure: {reason}")
    scheduler(monkeypatch, sbatch=error, sinfo="")
    text = script({}, 1, Path("/runs/logs"))
    with pytest.raises(slurm.Refused) as refused:
        slurm.check(text)
    assert refused.value.key == key
    assert key in Cluster.model_fields
    assert refused.value.reason.startswith(f"{reason}, asked for --cpus-per-task=12 ")
    assert "--partition=gpu" in refused.value.reason


def test_an_absent_controller_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "sbatch failed (1): allocation failure: Unable to contact slurm controller"
    scheduler(monkeypatch, sbatch=ClusterError(said))
    with pytest.raises(ClusterError, match="Unable to contact"):
        slurm.check("#!/bin/sh\n")


# ---------------------------------------------------------------- which cluster is here


@pytest.mark.parametrize(
    ("config", "name"),
    [("Configuration data\nClusterName             = campus\nX = y\n", "campus"), ("Nothing", None),
     (ClusterError("scontrol failed (1): Could not establish a configuration source"), None)],
)  # fmt: skip
def test_cluster_name(
    config: str | Exception, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda command: f"/usr/bin/{command}")
    scheduler(monkeypatch, scontrol=config)
    assert slurm.cluster_name() == name
    monkeypatch.setattr("shutil.which", lambda command: None)
    assert slurm.cluster_name() is None
    assert profile.detect() == "local"


def test_node_address(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = "NodeName=n1 Arch=x86_64 NodeAddr=10.0.0.7 NodeHostName=n1 Port=0\n"
    scheduler(monkeypatch, scontrol=answer)
    assert slurm.node_address("n1") == "10.0.0.7"
    scheduler(monkeypatch, scontrol="NodeName=n1\n")
    with pytest.raises(ClusterError, match="no NodeAddr of node n1"):
        slurm.node_address("n1")
