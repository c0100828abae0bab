"""Tests predicted time and disk space against formulas by hand, and time limits."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from builders import BILLION, CLASSIFY, COMPLETE, cluster, facts, layout, plan_inputs, recipe
from hpcft.core.records import Calibration, Layout, ModelFacts, RunTime, StepTime
from hpcft.planning import disk, run_time, step_time
from hpcft.planning.dataset_size import count_examples
from hpcft.planning.hardware import Rates, hardware_rates
from hpcft.planning.inputs import PlanInputs

HOP = step_time.HOP_S
# One number for everything, so that a time is a count of bytes or FLOPs.
UNIT = Rates(flops=1e12, link=1e9, network=1e9, host_link=1e9, host_memory=1e9, disk=1e9)
STEP = StepTime(compute_s=1.0, communication_s=0.5, offload_s=0.5)


def on_nodes(stage: int, nodes: int = 1, ranks: int = 1, **changes: Any) -> Layout:
    """Returns a layout of so many nodes with so many ranks each."""
    return layout(stage, ranks, nodes=nodes, **changes)


def inputs_of(
    known: ModelFacts | None = None,
    *,
    method: str = "full",
    length: int = 64,
    site: str = "a100-80",
) -> PlanInputs:
    """Returns the inputs of a made-up model with a method and a sequence length."""
    made = recipe(method={"name": method}, task=CLASSIFY | {"max_length": length})
    return plan_inputs(made, cluster(site), known)


# ---------------------------------------------------------------- compute


@pytest.mark.parametrize(
    ("method", "trainable", "checkpointing", "per_parameter"),
    [
        ("full", BILLION, False, 6),
        ("full", BILLION, True, 8),
        ("lora", 0, False, 4),
        ("lora", 0, True, 6),
    ],
)
def test_micro_batch_flops_equals_formula(
    method: str, trainable: int, checkpointing: bool, per_parameter: int
) -> None:
    """6·P for a token, 8·P recomputed, 4·P without gradients; attention 4, 8 and 12·L·S·H."""
    inputs = inputs_of(facts(trainable=trainable), method=method, length=100)
    full = {6: 12, 8: 16, 4: 12}[per_parameter]
    attention = full if method == "full" else 12 + 4 * checkpointing
    flops = step_time.micro_batch_flops(inputs, on_nodes(0, gradient_checkpointing=checkpointing))
    assert flops == 100 * (per_parameter * BILLION + attention * 16 * 100 * 2048)


def test_flops_leave_embedding_tables_out() -> None:
    known = facts(embedding_parameters=BILLION // 4)
    assert step_time.forward_flops(known, 1, 0) == 2 * (BILLION - BILLION // 4)
    flops = step_time.micro_batch_flops(inputs_of(known, length=10), on_nodes(0))
    assert flops == 10 * (6 * (BILLION - BILLION // 4) + 12 * 16 * 10 * 2048)


def test_micro_batch_flops_with_frozen_base_has_no_backward_pass_through_it() -> None:
    """A trained head on a frozen base takes a forward pass and the head's own gradient."""
    known = facts(trainable=1000)
    forward = step_time.forward_flops(known, 10, 10)
    inputs = inputs_of(known, length=10)
    assert step_time.micro_batch_flops(inputs, on_nodes(0)) == forward + 10 * 2 * 1000


def test_micro_batch_flops_with_chunked_loss_computes_logits_twice() -> None:
    inputs = inputs_of(length=10)
    at_once, chunked = (
        step_time.micro_batch_flops(inputs, on_nodes(0, loss_chunks=n)) for n in (1, 8)
    )
    assert chunked - at_once == 10 * 2 * 2048 * 32000


def test_step_time_is_less_efficient_for_tiny_micro_batches() -> None:
    inputs = inputs_of()
    shares = []
    for size in (1, 8, 64):
        accumulation = 64 // size
        x = on_nodes(0, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
        step = step_time.predict_step_time(inputs, x)
        flops = accumulation * step_time.micro_batch_flops(inputs, x)
        shares.append(flops / step.compute_s / 312e12)
    assert shares == sorted(shares)
    assert shares[0] < 0.1
    assert 0.3 < shares[-1] < 0.35


def test_step_time_is_longer_with_4_bit_weights() -> None:
    lora = inputs_of(facts(trainable=0), method="lora", length=1024)
    qlora = inputs_of(facts(trainable=0, quantised=1), method="qlora", length=1024)
    lora_s, qlora_s = (
        step_time.predict_step_time(inputs, on_nodes(0)).total_s for inputs in (lora, qlora)
    )
    assert 1.2 < qlora_s / lora_s < 1.39


# ---------------------------------------------------------------- communication


@pytest.mark.parametrize(
    ("stage", "accumulated", "gigabytes"),
    [
        (0, 4, 2 * 4),  # fp32 gradients, reduced and gathered once
        (1, 4, 2 * 2),
        (2, 1, 2 * 2),
        (2, 4, 5 * 2),  # reduced in each of 4 micro-batches, weights gathered once
        (3, 1, 3 * 2),  # Rajbhandari et al., section 7: 1.5 times plain data parallelism
        (3, 4, 4 * 3 * 2),
    ],
)
def test_communication_equals_formula(stage: int, accumulated: int, gigabytes: int) -> None:
    """In 16 bits a billion parameters are 2 · 10⁹ bytes, 3/4 of which come from other ranks."""
    x = on_nodes(stage, ranks=4, gradient_accumulation_steps=accumulated)
    seconds = step_time._communication_s(inputs_of(), x, UNIT)
    passes = {0: 2, 1: 2, 2: accumulated + 1, 3: 3 * accumulated}[stage]
    assert seconds == pytest.approx(gigabytes * 3 / 4 + passes * 16 * 3 * HOP)


def test_communication_between_nodes_shares_the_network() -> None:
    """8 GB to all of 2 × 4 GPUs: half through each node's network, 3/4 over each GPU's link."""
    slow = Rates(**{**vars(UNIT), "network": 0.5e9})
    seconds = step_time._collectives_s(8e9, 0, on_nodes(3, nodes=2, ranks=4), slow)
    assert seconds == pytest.approx(8 * (1 / 2) / 0.5 + 8 * (3 / 4))


def test_communication_of_frozen_weights_has_no_gradients() -> None:
    frozen = inputs_of(facts(trainable=0))
    seconds = step_time._communication_s(frozen, on_nodes(3, ranks=2), UNIT)
    assert seconds == pytest.approx(2 * 2 / 2 + 3 * 16 * HOP)


def test_communication_of_one_rank_is_zero() -> None:
    assert step_time._communication_s(inputs_of(), on_nodes(3), UNIT) == 0


# ---------------------------------------------------------------- offload


@pytest.mark.parametrize(
    ("places", "seconds"),
    [
        # 2 GB of gradients over 4 ranks for each of 2 micro-batches, as much of weights, 30 of Adam
        (("cpu", "none"), 3 * 2 / 4 + 30),
        (("cpu", "cpu"), 3 * 2 / 4 + 30 + 4 * 2 / 4),  # and weights up twice a micro-batch
        (("nvme", "none"), 3 * 2 / 4 + 30 + 24),  # and 12 bytes read and written
        (("nvme", "nvme"), 3 * 2 / 4 + 30 + 24 + 4 * 2 / 4 + 5 * 2),
    ],
)
def test_offloading_time_equals_formula(places: tuple[str, str], seconds: float) -> None:
    optimizer, param = places
    x = on_nodes(3, ranks=4, gradient_accumulation_steps=2, offload_optimizer=optimizer,
                 offload_param=param)  # fmt: skip
    assert step_time._offload_s(inputs_of(), x, UNIT) == pytest.approx(seconds)


def test_offloading_on_a_cpu_takes_no_time() -> None:
    x = on_nodes(3, ranks=2, offload_optimizer="cpu")
    assert step_time.predict_step_time(inputs_of(site="cpu"), x).offload_s == 0


# ---------------------------------------------------------------- rates


def test_hardware_rates_come_from_the_profile_or_from_the_generation() -> None:
    a100 = hardware_rates(cluster("a100-80"), "bf16", 4)
    assert a100.flops == pytest.approx(0.35 * 312e12)
    assert a100.link == pytest.approx(0.75 * 300e9)
    assert a100.network == pytest.approx(0.75 * 100e9)
    gpu = cluster("a100-80").gpu
    assert gpu is not None
    bare = gpu.model_copy(update={"peak_tflops": None, "link_gb_s": None, "host_link_gb_s": None})
    unstated = hardware_rates(cluster("a100-80", gpu=bare, network_gb_s=None), "bf16", 4)
    assert unstated.flops < a100.flops, "without stated values a slow card is assumed"
    assert unstated.link == unstated.host_link == a100.host_link, "without NVLink over PCIe"
    assert unstated.network == pytest.approx(0.75 * 1.25e9)


def test_hardware_rates_in_fp32_use_no_tensor_cores() -> None:
    t4, p100 = cluster("t4-16"), cluster("p100-16")
    assert hardware_rates(t4, "fp32", 1).flops == hardware_rates(t4, "fp16", 1).flops / 8
    assert hardware_rates(p100, "fp32", 1).flops == hardware_rates(p100, "fp16", 1).flops / 2


def test_hardware_rates_use_the_calibrated_efficiency() -> None:
    known = cluster("a100-80", calibration=Calibration(efficiency=0.5))
    assert hardware_rates(known, "bf16", 4).flops == pytest.approx(0.5 * 312e12)


def test_hardware_rates_divide_cores_among_ranks_on_a_cpu() -> None:
    two, many = (hardware_rates(cluster("cpu"), "fp32", ranks).flops for ranks in (2, 64))
    assert two == 32 * many


# ---------------------------------------------------------------- whole runs


def run(
    site: str = "a100-80", examples: dict[Any, int] | None = None, **sections: Any
) -> tuple[PlanInputs, RunTime]:
    """Returns the inputs of a run whose step takes 2 seconds, and its predicted time."""
    inputs = plan_inputs(recipe(**sections), cluster(site), examples=examples or {})
    return inputs, run_time.predict_run_time(inputs, on_nodes(0), STEP)


def test_total_steps_follow_from_examples_or_max_steps() -> None:
    known = {"train": 1001, "test": 10}
    assert run(examples=known, train={"global_batch_size": 10})[1].steps == 3 * 101
    assert run(examples=known, train={"max_steps": 7})[1].steps == 7
    assert run()[1].steps is None
    assert run()[1].run_s is None


def test_run_time_is_the_sum_of_its_parts() -> None:
    inputs, time = run(examples={"train": 160, "test": 100}, train={"max_steps": 50})
    flops = 100 * step_time.forward_flops(facts(), 512, 512)
    assert time.evaluation_s == pytest.approx(flops / (0.35 * 312e12))
    assert time.start_s == pytest.approx(run_time.START_S + 2 * BILLION / 0.5e9)
    assert time.saving_s == pytest.approx(4 * BILLION / 0.5e9)
    parts = time.start_s + 50 * 2.0 + time.evaluation_s + time.saving_s
    assert time.run_s == pytest.approx(parts)
    limit = run_time.time_limit_min(inputs, time)
    assert limit % 5 == 0
    assert 2 * parts / 60 + 10 <= limit < 2 * parts / 60 + 15


def test_evaluation_time_counts_choices_and_scoring_before_training() -> None:
    sized = {"train": 10, "test": 100}
    once = run(examples=sized, task=COMPLETE)[1].evaluation_s
    choices = COMPLETE | {"choices": ["1", "2"]}
    twice = run(examples=sized, task=choices, evaluation={"before": True})[1].evaluation_s
    assert once is not None
    assert twice == pytest.approx(4 * once)


def test_time_limit_with_unknown_sizes_is_the_longest_allowed() -> None:
    inputs, time = run(train={"max_steps": 5})
    assert time.run_s is None, "the number of scored examples is unknown"
    assert run_time.time_limit_min(inputs, time) == 1440


def test_time_limit_of_a_short_run() -> None:
    short = {"examples": {"train": 16, "test": 1}, "train": {"max_steps": 1}}
    inputs, time = run(**short)
    assert run_time.time_limit_min(inputs, time) == 15
    assert run_time.time_limit_min(inputs.with_cluster(time_limit_min=12), time) == 12
    local, _ = run("local", **short)
    assert run_time.time_limit_min(local, time) == 10080, "nobody waits for a local run to end"
    requested, time = run(**short, resources={"time_min": 77})
    assert run_time.time_limit_min(requested, time) == 77


# ---------------------------------------------------------------- disk


def test_checkpoint_bytes_equals_formula() -> None:
    """16-bit weights, once as a model and once in DeepSpeed's shards, and 12 bytes of states."""
    assert disk.checkpoint_bytes(inputs_of(), on_nodes(3)) == (2 + 2 + 12) * BILLION
    assert disk.checkpoint_bytes(inputs_of(), on_nodes(0)) == (4 + 8) * BILLION
    adapter = inputs_of(facts(8 * BILLION, trainable=1_000_000), method="lora")
    assert disk.checkpoint_bytes(adapter, on_nodes(0)) == (4 + 8) * 1_000_000


@pytest.mark.parametrize(
    ("train", "written", "count"),
    [
        ({}, 0, 2),  # one to resume from; and the new one before the old one goes
        ({"save_strategy": "epoch"}, 3, 2),
        ({"save_strategy": "epoch", "save_total_limit": 5}, 3, 5),
        ({"save_strategy": "steps", "save_total_limit": 3}, None, 4),
        ({"save_strategy": "epoch", "load_best_model_at_end": True}, 3, 3),
    ],
)
def test_run_folder_items_count_checkpoints_at_a_time(
    train: dict[str, Any], written: int | None, count: int
) -> None:
    items = disk.run_folder_items(plan_inputs(recipe(train=train)), on_nodes(3), written)
    held = {item.name: item.bytes for item in items}
    assert held["finished model"] == 2 * BILLION
    assert held.get("checkpoints", 0) == count * 16 * BILLION


def test_node_disk_bytes_equals_formula() -> None:
    both = on_nodes(3, nodes=2, offload_optimizer="nvme", offload_param="nvme")
    assert disk.node_disk_bytes(inputs_of(), both) == (16 + 2) * BILLION // 2
    assert disk.node_disk_bytes(inputs_of(), on_nodes(3, offload_optimizer="cpu")) == 0


# ---------------------------------------------------------------- examples


def data(**fields: Any) -> Any:
    """Returns the data section of a recipe."""
    return recipe(task=CLASSIFY | {"data": fields}).task.data


def test_count_examples_counts_local_files(tmp_path: Path) -> None:
    rows = [json.dumps({"text": "a", "label": "b"})] * 100
    (tmp_path / "a.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "b.csv").write_text("text,label\n" + "x,y\n" * 30)
    (tmp_path / "c.json").write_text(json.dumps([{"text": "a"}] * 7))
    files = {"train": str(tmp_path / "a.jsonl"), "validation": str(tmp_path / "b.csv"),
             "test": str(tmp_path / "c.json")}  # fmt: skip
    assert count_examples(data(files=files)) == {"train": 100, "validation": 30, "test": 7}
    sampled = data(files=files, sample={"train": 0.5}, limits={"validation": 5, "test": 99})
    assert count_examples(sampled) == {"train": 50, "validation": 5, "test": 7}
    cut = data(files={"train": files["train"]}, fractions={"train": 0.7, "test": 0.3})
    assert count_examples(cut) == {"train": 70, "test": 30}


def test_count_examples_counts_packed_files_and_lines_of_json(tmp_path: Path) -> None:
    lines = "".join(f'{{"text": "a {n}"}}\n' for n in range(100))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "b.tsv").write_text("text\tlabel\n" + "x\ty\n" * 30)
    (tmp_path / "c.json").write_text(lines)
    files = {"train": str(tmp_path / "a.jsonl.gz"), "validation": str(tmp_path / "b.tsv"),
             "test": str(tmp_path / "c.json")}  # fmt: skip
    assert count_examples(data(files=files)) == {"train": 100, "validation": 30, "test": 100}


def test_count_examples_of_hub_data_gives_limits_only(tmp_path: Path) -> None:
    assert count_examples(data(path="x/y", limits={"test": 2500})) == {"test": 2500}
    assert count_examples(data(files={"train": str(tmp_path / "gone.jsonl")})) == {}


def test_count_examples_reads_the_footer_of_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 12}), file)
    assert count_examples(data(files={"train": str(file)})) == {"train": 12}


def test_count_examples_estimates_from_part_of_a_large_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "0123456789"}\n' * 1000)
    monkeypatch.setattr("hpcft.planning.dataset_size.COUNTED_BYTES", 2300)
    assert count_examples(data(files={"train": str(file)}))["train"] == pytest.approx(1000, abs=10)
