"""Time and disk: formulas by hand, whole runs, time limits, and how many examples are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from builders import BILLION, CLASSIFY, COMPLETE, cluster, facts, layout, recipe
from hpcft.core.records import Calibration, Layout, StepTime
from hpcft.planning import disk, run_time, step_time
from hpcft.planning.dataset_size import count_examples
from hpcft.planning.hardware import Rates, hardware_rates

HOP = step_time.HOP_S
# One number for everything, so that a time is a count of bytes or FLOPs.
UNIT = Rates(flops=1e12, link=1e9, network=1e9, host_link=1e9, host_memory=1e9, disk=1e9)
FULL, LORA, QLORA = (recipe(method={"name": name}).method for name in ("full", "lora", "qlora"))
STEP = StepTime(compute_s=1.0, communication_s=0.5, offload_s=0.5)


def laid(stage: int, nodes: int = 1, ranks: int = 1, **changes: Any) -> Layout:
    return layout(stage, ranks, nodes=nodes, **changes)


# ---------------------------------------------------------------- compute


@pytest.mark.parametrize(
    ("method", "trainable", "checkpointing", "per_parameter"),
    [(FULL, BILLION, False, 6), (FULL, BILLION, True, 8), (LORA, 0, False, 4), (LORA, 0, True, 6)],
)
def test_flops_by_hand(
    method: Any, trainable: int, checkpointing: bool, per_parameter: int
) -> None:
    """6·P for a token, 8·P recomputed, 4·P without gradients; attention 4, 8 and 12·L·S·H."""
    known = facts(trainable=trainable)
    attention = {6: 12, 8: 16, 4: 12}[per_parameter] if method is FULL else 12 + 4 * checkpointing
    found = step_time.step_flops(known, method, laid(0, gradient_checkpointing=checkpointing), 100)
    assert found == 100 * (per_parameter * BILLION + attention * 16 * 100 * 2048)


def test_tables_are_looked_up_not_multiplied() -> None:
    known = facts(embedding_parameters=BILLION // 4)
    assert step_time.forward_flops(known, 1, 0) == 2 * (BILLION - BILLION // 4)
    assert step_time.step_flops(known, FULL, laid(0), 0) == 0


def test_nothing_passes_back_through_a_frozen_base() -> None:
    """A trained head on a frozen base: forward, and the head's own gradient."""
    known = facts(trainable=1000)
    forward = step_time.forward_flops(known, 10, 10)
    assert step_time.step_flops(known, FULL, laid(0), 10) == forward + 10 * 2 * 1000


def test_logits_in_parts_are_made_twice() -> None:
    whole, parts = (step_time.step_flops(facts(), FULL, laid(0, loss_chunks=n), 10) for n in (1, 8))
    assert parts - whole == 10 * 2 * 2048 * 32000


def test_efficiency_falls_for_tiny_micro_batches() -> None:
    site = cluster("a100-80")
    shares = []
    for size in (1, 8, 64):
        x = laid(0, per_device_train_batch_size=size, gradient_accumulation_steps=64 // size)
        step = step_time.predict_step_time(facts(), FULL, x, "bf16", 64, site)
        flops = 64 // size * step_time.step_flops(facts(), FULL, x, 64)
        shares.append(flops / step.compute_s / 312e12)
    assert shares == sorted(shares)
    assert shares[0] < 0.1
    assert 0.3 < shares[-1] < 0.35


def test_4_bit_weights_cost_time() -> None:
    site = cluster("a100-80")
    lora = step_time.predict_step_time(facts(trainable=0), LORA, laid(0), "bf16", 1024, site)
    qlora = step_time.predict_step_time(
        facts(trainable=0, quantised=1), QLORA, laid(0), "bf16", 1024, site
    )
    assert 1.2 < qlora.total_s / lora.total_s < 1.39


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
def test_bytes_between_ranks_by_hand(stage: int, accumulated: int, gigabytes: int) -> None:
    """In 16 bits a billion parameters are 2 · 10⁹ bytes, 3/4 of which come from other ranks."""
    x = laid(stage, ranks=4, gradient_accumulation_steps=accumulated)
    found = step_time._communication_s(facts(), x, "bf16", UNIT)
    passes = {0: 2, 1: 2, 2: accumulated + 1, 3: 3 * accumulated}[stage]
    assert found == pytest.approx(gigabytes * 3 / 4 + passes * 16 * 3 * HOP)


def test_between_nodes_the_gpus_share_the_network() -> None:
    """8 GB to all of 2 × 4 GPUs: half through each node's network, 3/4 over each GPU's link."""
    slow = Rates(**{**vars(UNIT), "network": 0.5e9})
    found = step_time._spread_s(8e9, 0, laid(3, nodes=2, ranks=4), slow)
    assert found == pytest.approx(8 * (1 / 2) / 0.5 + 8 * (3 / 4))


def test_frozen_weights_are_gathered_but_have_no_gradients() -> None:
    frozen = step_time._communication_s(facts(trainable=0), laid(3, ranks=2), "bf16", UNIT)
    assert frozen == pytest.approx(2 * 2 / 2 + 3 * 16 * HOP)


def test_one_rank_talks_to_nobody() -> None:
    assert step_time._communication_s(facts(), laid(3), "bf16", UNIT) == 0


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
def test_offloading_by_hand(places: tuple[str, str], seconds: float) -> None:
    x = laid(3, ranks=4, gradient_accumulation_steps=2, offload_optimizer=places[0],
             offload_param=places[1])  # fmt: skip
    assert step_time._offload_s(facts(), x, "bf16", UNIT) == pytest.approx(seconds)


def test_on_a_cpu_offloading_moves_nothing() -> None:
    x = laid(3, ranks=2, offload_optimizer="cpu")
    assert step_time.predict_step_time(facts(), FULL, x, "fp32", 8, cluster("cpu")).offload_s == 0


# ---------------------------------------------------------------- rates


def test_rates_come_from_the_profile_or_from_the_class_of_hardware() -> None:
    a100 = hardware_rates(cluster("a100-80"), "bf16", 4)
    assert a100.flops == pytest.approx(0.35 * 312e12)
    assert a100.link == pytest.approx(0.75 * 300e9)
    assert a100.network == pytest.approx(0.75 * 100e9)
    gpu = cluster("a100-80").gpu
    assert gpu is not None
    bare = gpu.model_copy(update={"peak_tflops": None, "link_gb_s": None, "host_link_gb_s": None})
    unknown = hardware_rates(cluster("a100-80", gpu=bare, network_gb_s=None), "bf16", 4)
    assert unknown.flops < a100.flops, "what is not stated is that of a slow card"
    assert unknown.link == unknown.host_link == a100.host_link, "without NVLink over PCIe"
    assert unknown.network == pytest.approx(0.75 * 1.25e9)


def test_fp32_does_without_tensor_cores() -> None:
    t4, p100 = cluster("t4-16"), cluster("p100-16")
    assert hardware_rates(t4, "fp32", 1).flops == hardware_rates(t4, "fp16", 1).flops / 8
    assert hardware_rates(p100, "fp32", 1).flops == hardware_rates(p100, "fp16", 1).flops / 2


def test_calibration_replaces_the_stated_efficiency() -> None:
    known = cluster("a100-80", calibration=Calibration(efficiency=0.5))
    assert hardware_rates(known, "bf16", 4).flops == pytest.approx(0.5 * 312e12)


def test_ranks_on_a_cpu_share_its_cores() -> None:
    assert (
        hardware_rates(cluster("cpu"), "fp32", 2).flops
        == 32 * hardware_rates(cluster("cpu"), "fp32", 64).flops
    )


# ---------------------------------------------------------------- whole runs


def run(site: str = "a100-80", examples: dict[Any, int] | None = None, **sections: Any) -> Any:
    made = recipe(**sections)
    time = run_time.predict_run_time(
        STEP, made, facts(), laid(0), "bf16", cluster(site), examples or {}
    )
    return made, time


def test_steps_of_a_run() -> None:
    known = {"train": 1001, "test": 10}
    assert run(examples=known, train={"global_batch_size": 10})[1].steps == 3 * 101
    assert run(examples=known, train={"max_steps": 7})[1].steps == 7
    assert run()[1].steps is None
    assert run()[1].run_s is None


def test_a_run_is_its_parts() -> None:
    made, time = run(examples={"train": 160, "test": 100}, train={"max_steps": 50})
    flops = 100 * step_time.forward_flops(facts(), 512, 512)
    assert time.evaluation_s == pytest.approx(flops / (0.35 * 312e12))
    assert time.start_s == pytest.approx(run_time.START_S + 2 * BILLION / 0.5e9)
    assert time.saving_s == pytest.approx(4 * BILLION / 0.5e9)
    parts = time.start_s + 50 * 2.0 + time.evaluation_s + time.saving_s
    assert time.run_s == pytest.approx(parts)
    limit = run_time.time_limit_min(time, made, cluster("a100-80"))
    assert limit % 5 == 0
    assert 2 * parts / 60 + 10 <= limit < 2 * parts / 60 + 15


def test_choices_and_scoring_before_count() -> None:
    sized = {"train": 10, "test": 100}
    once = run(examples=sized, task=COMPLETE)[1].evaluation_s
    choices = COMPLETE | {"choices": ["1", "2"]}
    twice = run(examples=sized, task=choices, evaluation={"before": True})[1].evaluation_s
    assert twice == pytest.approx(4 * once)


def test_where_sizes_are_unknown_the_limit_is_the_most_that_is_allowed() -> None:
    made, time = run(train={"max_steps": 5})
    assert time.run_s is None, "how many examples are scored is not known"
    assert run_time.time_limit_min(time, made, cluster("a100-80")) == 1440


def test_limits() -> None:
    short = {"examples": {"train": 16, "test": 1}, "train": {"max_steps": 1}}
    made, time = run(**short)
    assert run_time.time_limit_min(time, made, cluster("a100-80")) == 15
    assert run_time.time_limit_min(time, made, cluster("a100-80", time_limit_min=12)) == 12
    assert run_time.time_limit_min(time, made, cluster("local")) == 10080, "nobody queues here"
    asked, time = run(**short, resources={"time_min": 77})
    assert run_time.time_limit_min(time, asked, cluster("a100-80")) == 77


# ---------------------------------------------------------------- disk


def test_checkpoints_by_hand() -> None:
    """16-bit weights, once as a model and once in DeepSpeed's shards, and 12 bytes of states."""
    made = recipe()
    assert disk.checkpoint_bytes(facts(), made, laid(3), "bf16") == (2 + 2 + 12) * BILLION
    assert disk.checkpoint_bytes(facts(), made, laid(0), "bf16") == (4 + 8) * BILLION
    adapter = recipe(method={"name": "lora"})
    small = facts(8 * BILLION, trainable=1_000_000)
    assert disk.checkpoint_bytes(small, adapter, laid(0), "bf16") == (4 + 8) * 1_000_000


@pytest.mark.parametrize(
    ("train", "written", "count"),
    [
        ({}, 0, 2),  # to go on from; and the new one before the old one goes
        ({"save_strategy": "epoch"}, 3, 2),
        ({"save_strategy": "epoch", "save_total_limit": 5}, 3, 5),
        ({"save_strategy": "steps", "save_total_limit": 3}, None, 4),
        ({"save_strategy": "epoch", "load_best_model_at_end": True}, 3, 3),
    ],
)
def test_checkpoints_at_a_time(train: dict[str, Any], written: int | None, count: int) -> None:
    made = recipe(train=train)
    items = disk.run_folder_items(facts(), made, laid(3), "bf16", written)
    held = {item.name: item.bytes for item in items}
    assert held["finished model"] == 2 * BILLION
    assert held.get("checkpoints", 0) == count * 16 * BILLION


def test_room_on_the_nodes_disks() -> None:
    both = laid(3, nodes=2, offload_optimizer="nvme", offload_param="nvme")
    assert disk.node_disk_bytes(facts(), both, "bf16") == (16 + 2) * BILLION // 2
    assert disk.node_disk_bytes(facts(), laid(3, offload_optimizer="cpu"), "bf16") == 0


# ---------------------------------------------------------------- examples


def data(**fields: Any) -> Any:
    return recipe(task=CLASSIFY | {"data": fields}).task.data


def test_local_files_are_counted(tmp_path: Path) -> None:
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


def test_what_is_not_local_is_known_by_its_limits_only(tmp_path: Path) -> None:
    assert count_examples(data(path="x/y", limits={"test": 2500})) == {"test": 2500}
    assert count_examples(data(files={"train": str(tmp_path / "gone.jsonl")})) == {}


def test_parquet_is_counted_by_its_footer(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 12}), file)
    assert count_examples(data(files={"train": str(file)})) == {"train": 12}


def test_of_a_large_file_a_part_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "0123456789"}\n' * 1000)
    monkeypatch.setattr("hpcft.planning.dataset_size.COUNTED_BYTES", 2300)
    assert count_examples(data(files={"train": str(file)}))["train"] == pytest.approx(1000, abs=10)
