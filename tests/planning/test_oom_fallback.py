"""The ladder: which rung follows, and whose memory ran out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpcft.config.recipe_types import FullRecipe
from hpcft.core import files
from hpcft.core.paths import RunPaths
from hpcft.core.records import (
    Attempt,
    Cluster,
    Gpu,
    Layout,
    ModelFacts,
    OomCaps,
    ParameterCount,
    Plan,
    Recovery,
    RunRecord,
)
from hpcft.core.units import GIB
from hpcft.planning import caps, deepspeed_config, oom_fallback
from hpcft.recovery.diagnosis import STARTS_AGAIN, RankError, explain_failure
from hpcft.recovery.diagnosis.oom import parse_gpu_usage, parse_out_of_memory
from hpcft.recovery.log import append_recovery, current_plan, read_recoveries
from hpcft.scheduler.job_state import JobState
from hpcft.training.supervision import oom_killer


def recipe(**sections: Any) -> FullRecipe:
    made: dict[str, Any] = {
        "name": "made", "model": {"path": "x/y"}, "method": {"name": "full"},
        "task": {"name": "classification", "labels": ["a", "b"], "data": {"path": "x/y"}},
        "train": {"global_batch_size": 16}, **sections,
    }  # fmt: skip
    return FullRecipe.model_validate(made)


def site(**changes: Any) -> Cluster:
    gpu = Gpu(name="A", memory_gib=40.0, compute_capability=8.0)
    fields: dict[str, Any] = {
        "name": "site", "scheduler": "slurm", "accelerator": "cuda", "max_nodes": 4, "gpu": gpu,
        "gpus_per_node": 4, "cores_per_node": 32, "host_memory_gib": 500.0, **changes,
    }  # fmt: skip
    return Cluster(**fields)


def layout(micro: int, ranks: int = 1, **changes: Any) -> Layout:
    fields: dict[str, Any] = {
        "nodes": 1, "ranks_per_node": ranks, "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": 16 // (micro * ranks), "gradient_checkpointing": False,
        "zero_stage": 0, "offload_optimizer": "none", "offload_param": "none",
    }  # fmt: skip
    return Layout(**(fields | changes))


def plan(laid: Layout, made: FullRecipe, there: Cluster, eval_batch: int = 8) -> Plan:
    facts = ModelFacts(
        model_type="llama", layers=2, hidden_size=64,
        vocab_size=100, logits_width=2,
        parameters=ParameterCount(total=1000, trainable=1000, added=0, largest_layer=100),
    )  # fmt: skip
    return Plan(
        recipe="made", cluster="site", accelerator=there.accelerator, layout=laid,
        precision="bf16", optim="adamw_torch", per_device_eval_batch_size=eval_batch, facts=facts,
        gpu_memory=[], gpu_capacity_bytes=40 * GIB, host_memory=[], host_capacity_bytes=GIB,
        cpus_per_task=1, mem_mib=1, time_min=1,
        ds_config=deepspeed_config.build_deepspeed_config(laid, "bf16", facts, made.train, there),
    )  # fmt: skip


def way_down(first: Plan, made: FullRecipe, there: Cluster) -> list[str]:
    """What each rung changes, until there is none; the global batch is the same on all of them."""
    changes, now = [], first
    while (below := oom_fallback.next_fallback(now, made, there, "step")) is not None:
        new = below.layout
        each = new.per_device_train_batch_size * new.gradient_accumulation_steps
        assert each * new.world_size == made.train.global_batch_size
        if below.ds_config:
            assert below.ds_config["train_batch_size"] == made.train.global_batch_size
            micro = below.ds_config["train_micro_batch_size_per_gpu"]
            assert micro == new.per_device_train_batch_size
            assert below.ds_config["zero_optimization"]["stage"] == new.zero_stage
        assert (below.ds_config is None) == (new.zero_stage == 0)
        changes.append(oom_fallback.describe_change(now, below))
        now = below
    return changes


HALVES = ["micro-batch 8 → 4", "micro-batch 4 → 2", "micro-batch 2 → 1"]
OFFLOADS = ["no sharding → ZeRO-2, optimizer on cpu", "ZeRO-2 → ZeRO-3",
            "parameters on cpu"]  # fmt: skip
QLORA = {"name": "qlora", "r": 4}


@pytest.mark.parametrize(
    ("sections", "changes", "ranks", "expected"),
    [
        ({}, {}, 1, [*HALVES, "checkpointing", *OFFLOADS]),
        ({}, {}, 2, [*HALVES, "checkpointing", "no sharding → ZeRO-1", "ZeRO-1 → ZeRO-2",
                     "ZeRO-2 → ZeRO-3", "optimizer on cpu", "parameters on cpu"]),
        # What a recipe fixes of the batch and of checkpointing changes nothing in its result.
        ({"train": {"global_batch_size": 16, "per_device_train_batch_size": 8,
                    "gradient_checkpointing": False}}, {}, 1,
         [*HALVES, "checkpointing", *OFFLOADS]),
        # What it fixes of sharding and offloading stays; so does what its method cannot do.
        ({"resources": {"zero_stage": 2, "offload_optimizer": "none"}}, {"zero_stage": 2}, 2,
         [*HALVES, "checkpointing"]),
        ({"train": {"global_batch_size": 16, "optim": "paged_adamw_8bit"}, "method": QLORA}, {}, 1,
         [*HALVES, "checkpointing"]),
        ({"train": {"global_batch_size": 16, "gradient_checkpointing": True}},
         {"gradient_checkpointing": True, "zero_stage": 3, "offload_optimizer": "cpu"}, 1,
         [*HALVES, "parameters on cpu"]),
        ({"train": {"global_batch_size": 24}}, {"gradient_accumulation_steps": 3}, 1,
         [*HALVES, "checkpointing", *OFFLOADS]),
    ],
)  # fmt: skip
def test_the_rungs_in_their_order(
    sections: dict[str, Any], changes: dict[str, Any], ranks: int, expected: list[str]
) -> None:
    made, there = recipe(**sections), site()
    first = plan(layout(8, ranks, **changes), made, there)
    assert way_down(first, made, there) == expected


def test_on_a_cpu_nothing_is_offloaded() -> None:
    there = site(accelerator="cpu", gpu=None, gpus_per_node=0)
    made = recipe()
    assert way_down(plan(layout(8), made, there), made, there) == [*HALVES, "checkpointing"]


@pytest.mark.parametrize(("total", "micro", "below"), [(12, 6, 3), (12, 3, 1), (7, 7, 1)])
def test_micro_batches_make_up_the_global_batch_exactly(total: int, micro: int, below: int) -> None:
    laid = layout(micro, gradient_accumulation_steps=total // micro)
    found = oom_fallback.next_layout(laid, recipe(train={"global_batch_size": total}), site())
    assert found is not None
    assert found.per_device_train_batch_size == below
    assert below * found.gradient_accumulation_steps == total


def test_a_smaller_batch_is_no_answer_where_the_states_do_not_fit() -> None:
    made, there = recipe(), site()
    below = oom_fallback.next_fallback(plan(layout(8), made, there), made, there, "states")
    assert below is not None
    assert below.layout.per_device_train_batch_size == 8
    assert below.layout.offload_optimizer == "cpu"


def test_scoring_has_a_batch_of_its_own() -> None:
    made, there = recipe(), site()
    now: Plan | None = plan(layout(8), made, there, eval_batch=4)
    sizes = []
    while now is not None and now.layout == layout(8):
        sizes.append(now.per_device_eval_batch_size)
        now = oom_fallback.next_fallback(now, made, there, "evaluation")
    assert sizes == [4, 2, 1]
    assert now is not None, "then weights and optimizer have to give way"
    stepped = oom_fallback.next_fallback(
        plan(layout(8), made, there, eval_batch=32), made, there, "step"
    )
    assert stepped is not None
    assert stepped.per_device_eval_batch_size == 16, "it was a multiple of the micro-batch"


def test_more_nodes_are_advised_where_they_would_hold_less() -> None:
    laid = layout(1, 4, zero_stage=3, gradient_checkpointing=True)
    assert oom_fallback.next_node_count(laid, recipe(), site()) == 2
    assert oom_fallback.next_node_count(laid, recipe(), site(max_nodes=1)) is None
    only_four = recipe(train={"global_batch_size": 4})
    assert oom_fallback.next_node_count(laid, only_four, site()) is None, "a rank needs an example"


def test_host_memory_is_asked_for_twice_over_up_to_what_a_node_has() -> None:
    first = plan(layout(8), recipe(), site()).model_copy(
        update={"mem_mib": 3 * 1024, "host_capacity_bytes": 8 * GIB}
    )
    second = oom_fallback.double_host_memory(first)
    assert second is not None
    assert oom_fallback.describe_change(first, second) == "host memory 3 GiB → 6 GiB"
    third = oom_fallback.double_host_memory(second)
    assert third is not None
    assert third.mem_mib == 8 * 1024
    assert oom_fallback.double_host_memory(third) is None


def test_what_earlier_runs_came_down_to_caps_the_next_plan() -> None:
    def record(name: str, *micros: int, cause: str = "out_of_memory", **changes: Any) -> RunRecord:
        steps = [
            Recovery(number=i, at=1.0, cause=cause, job_id="1", rank=0, node="n",
                 change="less", evidence="",
                 action="restart", layout=layout(micro, **changes), per_device_eval_batch_size=1)
            for i, micro in enumerate(micros, 1)
        ]  # fmt: skip
        return RunRecord(
            run_id="a" * 8, recipe=name, cluster="site", finished_at=1.0, recoveries=steps
        )

    records = [
        record("made"),
        record("made", 8, 4),
        record("made", 2),
        record("other", 1),
        record("made", 1, cause="host_oom"),
        record("made", 2, gradient_checkpointing=True),
    ]
    cap = caps.caps_from_runs(records, "made", "site")
    assert cap == OomCaps(per_device_train_batch_size=2, gradient_checkpointing=True)
    assert caps.caps_from_runs(records, "made", "elsewhere") is None
    assert caps.caps_from_runs(records[:1], "made", "site") is None


def test_of_two_ranks_that_take_a_rung_one_does(workplace: Path) -> None:
    made, there = recipe(), site()
    paths = RunPaths(workplace)
    first = plan(layout(8, 2), made, there)
    files.write_record(paths.plan, first)
    below = oom_fallback.next_fallback(first, made, there, "step")
    assert below is not None
    for number in (0, 1):
        who = RankError(rank=number, node="n", at=float(number), kind="X", message="no memory")
        append_recovery(paths, first, below, number=1, action="restart", who=who)
    (rung,) = read_recoveries(paths)
    assert (rung.number, rung.rank, rung.change) == (1, 0, "micro-batch 8 → 4")
    assert current_plan(paths, made, there) == below
    assert files.read_record(paths.current_plan, Plan) == below
    assert files.read_record(paths.plan, Plan) == first, "what was submitted stays as it was"


# ---------------------------------------------------------------- whose memory ran out


CUDA = ("CUDA out of memory. Tried to allocate {wanted}. GPU 0 has a total capacity of 14.74 GiB "
        "of which {free} is free. {who}Of the allocated memory {own} is allocated by PyTorch, and "
        "{kept} is reserved by PyTorch but unallocated. If reserved but unallocated memory is "
        "large try setting PYTORCH_ALLOC_CONF=expandable_segments:True")  # fmt: skip
# The third death of the reports: three strangers on a shared server's GPU.
SHARED = CUDA.format(
    wanted="1002.00 MiB", free="52.44 MiB", own="4.72 GiB", kept="180.00 MiB",
    who="Process 3347037 has 4.65 GiB memory in use. Process 3320759 has 4.64 GiB memory in use. "
        "Process 3377253 has 5.40 GiB memory in use. ",
)  # fmt: skip


class OutOfMemoryError(RuntimeError):
    """Of the name of `torch.OutOfMemoryError`, which no machine without a GPU raises."""


@pytest.mark.parametrize(
    ("error", "of_host"),
    [
        (OutOfMemoryError(SHARED), False),
        (RuntimeError("CUDA error: out of memory"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), False),
        (RuntimeError("NCCL Error 1: Cuda failure 2 'out of memory'"), False),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't "
                      "allocate memory: you tried to allocate 9 bytes."), True),
        (MemoryError(), True),
        (MemoryError("std::bad_alloc"), True),
        (OSError(12, "Cannot allocate memory"), True),
    ],
)  # fmt: skip
def test_what_is_out_of_memory(error: BaseException, of_host: bool) -> None:
    short = parse_out_of_memory(error)
    assert short is not None
    assert short.of_host == of_host
    assert 0 < len(short.evidence) <= 300


@pytest.mark.parametrize(
    "error",
    [RuntimeError("Connection closed by peer"), ValueError("memory"), KeyError("labels"),
     RuntimeError("CUDA error: an illegal memory access was encountered")],
)  # fmt: skip
def test_what_is_not(error: BaseException) -> None:
    assert parse_out_of_memory(error) is None


def test_who_held_the_shared_card() -> None:
    use = parse_gpu_usage(SHARED)
    assert use is not None
    assert use.total == int(14.74 * GIB)
    assert use.own == int(5.40 * GIB), "in a container it is known by its size only"
    assert use.others == (
        ("process 3347037", int(4.65 * GIB)),
        ("process 3320759", int(4.64 * GIB)),
    )
    short = parse_out_of_memory(OutOfMemoryError(SHARED), planned_bytes=9 * GIB)
    assert short is not None
    assert short.foreign == (
        "other processes hold 9.29 GiB of the GPU's 14.7 GiB (process 3347037 4.65 GiB, "
        "process 3320759 4.64 GiB); this run holds 5.4 GiB of the 9 GiB planned"
    )


MINE = "Including non-PyTorch memory, this process has 13.90 GiB memory in use. "
SMALL = "Including non-PyTorch memory, this process has 2.00 GiB memory in use. "
BOGUS = "Including non-PyTorch memory, this process has 17179869184.00 GiB memory in use. "
OTHER = "Process 4711 has 12.20 GiB memory in use. "
DESKTOP = "Process 77 has 310.00 MiB memory in use. "


@pytest.mark.parametrize(
    ("who", "own", "planned_gib", "foreign"),
    [
        (MINE, "13.01 GiB", 12, False),
        (MINE, "13.01 GiB", None, False),
        (OTHER + SMALL, "1.50 GiB", 8, True),
        (OTHER + SMALL, "1.50 GiB", None, True),
        # It has more than was planned for it: the plan was wrong, whoever else is there.
        (OTHER + SMALL, "1.50 GiB", 2, False),
        # Others hold less than what is missing: without them it would have died too.
        (DESKTOP + MINE, "13.01 GiB", 15, False),
        (OTHER + BOGUS, "1.50 GiB", 8, True),
        # In a container the only process listed is this one, by number.
        ("Process 4711 has 13.61 GiB memory in use. ", "13.01 GiB", 12, False),
        # No process is listed, and most of what is used is not ours.
        ("", "2.00 GiB", 8, True),
        ("", "13.50 GiB", 12, False),
    ],
)
def test_memory_that_others_hold_is_told_apart(
    who: str, own: str, planned_gib: int | None, foreign: bool
) -> None:
    text = CUDA.format(wanted="1.00 GiB", free="540.00 MiB", who=who, own=own, kept="100.00 MiB")
    planned = None if planned_gib is None else planned_gib * GIB
    short = parse_out_of_memory(OutOfMemoryError(text), planned)
    assert short is not None
    assert bool(short.foreign) == foreign, short.foreign


def test_a_rank_that_knows_whose_memory_it_was_is_believed(workplace: Path) -> None:
    """Its text names other processes, which alone would blame them."""
    paths = RunPaths(workplace)
    paths.errors.mkdir()
    closed = {"rank": 0, "node": "n1", "at": 1.0, "kind": "RuntimeError",
              "message": "Connection closed by peer"}  # fmt: skip
    text = CUDA.format(wanted="1.00 GiB", free="1.00 MiB", who=OTHER + SMALL, own="1.50 GiB",
                       kept="0 bytes")  # fmt: skip
    judged = {"rank": 1, "node": "n1", "at": 2.0, "kind": "OutOfMemoryError", "message": text,
              "failure": "out_of_memory", "next_step": "set resources.nodes: 2"}  # fmt: skip
    for error in (closed, judged):
        files.write_record(paths.errors / f"{error['rank']}.json", RankError.model_validate(error))
    failure = explain_failure(paths, None, JobState("FAILED"))
    assert (failure.name, failure.next_step) == ("out_of_memory", "set resources.nodes: 2")


def test_what_a_new_start_has_answered_is_no_evidence(workplace: Path) -> None:
    paths = RunPaths(workplace)
    paths.logs.mkdir()
    attempt = Attempt(job_id="7", token="t", submitted_at=1.0, logs=str(paths.logs), host="h")
    log = paths.logs / "7_0_log.err"
    log.write_text(f"{SHARED}\n{STARTS_AGAIN} with less\nNo space left on device\n")
    assert explain_failure(paths, attempt, JobState("FAILED")).name == "disk"


# ---------------------------------------------------------------- killed by the kernel


def test_where_the_kernel_counts_its_kills(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "vmstat").write_text("nr_free_pages 7\noom_kill 3\n")
    assert oom_killer.counters(proc, groups) == [proc / "vmstat"]
    (proc / "self/cgroup").write_text("4:cpu,memory:/job_7\n1:cpu:/\n0::/step_0\n")
    assert oom_killer.counters(proc, groups) == [proc / "vmstat"], "no such folders"
    for name, text in (("memory/job_7/memory.oom_control", "under_oom 0\noom_kill 1\n"),
                       ("step_0/memory.events", "low 0\noom 2\noom_kill 2\n")):  # fmt: skip
        (groups / name).parent.mkdir(parents=True)
        (groups / name).write_text(text)
    found = oom_killer.counters(proc, groups)
    assert [file.name for file in found] == ["memory.oom_control", "memory.events"]
