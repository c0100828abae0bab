"""From run folders made up here to states, reasons, rows and pages; so is the scheduler."""

from __future__ import annotations

import csv
import io
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from conftest import Cli
from hpcft import collect, failures, monitor, reference, report, store
from hpcft.cluster import slurm
from hpcft.cluster.states import JobState
from hpcft.errors import ClusterError, UsageError
from hpcft.paths import RunPaths
from hpcft.recipe import FullRecipe
from hpcft.records import (
    Attempt,
    Baseline,
    Cluster,
    Confusion,
    Job,
    Layout,
    Measured,
    MemoryItem,
    ModelFacts,
    ParameterCount,
    Plan,
    Progress,
    RunRecord,
)

AWAY = ClusterError("squeue failed (1): Unable to contact slurm controller")
GIB = 2**30


# ---------------------------------------------------------------- made-up runs


def recipe(seed: int = 1, learning_rate: float = 1e-4, **sections: Any) -> FullRecipe:
    made: dict[str, Any] = {
        "name": "made", "model": {"path": "x/y"}, "method": {"name": "full"},
        "task": {"name": "classification", "labels": ["a", "b"], "data": {"path": "x/y"}},
        "train": {"seed": seed, "learning_rate": learning_rate}, **sections,
    }  # fmt: skip
    return FullRecipe.model_validate(made)


def record(run_id: str, **metrics: float) -> RunRecord:
    return RunRecord(
        run_id=run_id, recipe="made", finished_at=1.0, split="test", metrics=metrics,
        parameters=ParameterCount(total=66_364_418, trainable=592_130, added=0, largest_layer=0),
        measured=Measured(wall_s=3600.0, gpu_hours=2.0, peak_memory_bytes=3 * GIB,
                          peak_host_bytes=GIB),
        predicted_memory_bytes=4 * GIB,
    )  # fmt: skip


def plan() -> Plan:
    laid = Layout(nodes=1, ranks_per_node=1, per_device_train_batch_size=1,
                  gradient_accumulation_steps=1, gradient_checkpointing=False, zero_stage=0,
                  offload_optimizer="none", offload_param="none")  # fmt: skip
    facts = ModelFacts(
        model_type="bert", layers=1, hidden_size=1, intermediate_size=1, attention_heads=1,
        vocab_size=1, logits_width=1, logits_positions="sequence",
        parameters=ParameterCount(total=8_537_680_896, trainable=8_537_680_896, added=0,
                                  largest_layer=0),
    )  # fmt: skip
    return Plan(recipe="made", cluster="site", accelerator="cuda", layout=laid, precision="bf16",
                optim="adamw_torch", per_device_eval_batch_size=1, facts=facts,
                gpu_memory=[MemoryItem(name="all", bytes=70 * GIB, rule="")],
                gpu_capacity_bytes=80 * GIB, host_memory=[], host_capacity_bytes=1,
                cpus_per_task=1, mem_mib=1, time_min=1)  # fmt: skip


def progress(age_s: float = 0.0, **fields: Any) -> Progress:
    now = time.time()
    known: dict[str, Any] = {"phase": "training", "step": 30, "total_steps": 120, "node": "n7",
                             "loss": 0.51234, "eta_s": 75.0, "memory_bytes": GIB,
                             "peak_memory_bytes": 2 * GIB, "tokens_per_s": 12345.6}  # fmt: skip
    return Progress(updated_at=now - age_s, started_at=now - 100, **(known | fields))


@dataclass
class Runs:
    """Writes run folders, and answers for Slurm in their stead."""

    root: Path
    states: dict[str, JobState] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    away: ClusterError | None = None
    asked: list[str] = field(default_factory=list)

    def add(self, run_id: str, *, job_id: str | None = "11", scheduler: str = "slurm",
            parts: tuple[Any, ...] = (), errors: tuple[tuple[str, str], ...] = (),
            log: str = "", **fields: Any) -> RunPaths:  # fmt: skip
        """A run folder with these records, rank errors and this error log."""
        paths = RunPaths(self.root / "made" / run_id)
        store.create_folder(paths.folder)
        paths.logs.mkdir()
        attempt = Attempt(
            job_id=job_id,
            token=f"token-{run_id}",
            array_index=fields.pop("array_index", None),
            submitted_at=float(len(list(self.root.glob("made/*")))),
            logs=str(paths.logs),
            host=os.uname().nodename,
        )
        known: dict[str, Any] = {"run_id": run_id, "recipe": "made", "cluster": "site",
                                 "scheduler": scheduler, "attempts": [attempt]}  # fmt: skip
        store.write(paths.job, Job(**(known | fields)))
        files = {RunRecord: paths.result, Progress: paths.progress, Plan: paths.plan,
                 FullRecipe: paths.recipe}  # fmt: skip
        for part in parts:
            store.write(files[type(part)], part)
        for rank, (kind, message) in enumerate(errors):
            paths.errors.mkdir(exist_ok=True)
            said = failures.RankError(rank=rank, node=f"n{rank}", at=10.0 + rank, kind=kind,
                                      message=message)  # fmt: skip
            store.write(paths.errors / f"{rank}.json", said)
        if log:
            (paths.logs / f"{job_id}_0_log.err").write_text(log)
        return paths

    def view(self, run_id: str) -> monitor.View:
        """What is known of a run."""
        ((paths, job),) = store.find_run(self.root, run_id)
        return monitor.look(paths, job)

    def rows(self) -> list[collect.Row]:
        """The table of all runs."""
        return collect.rows(monitor.snapshot(store.runs_in(self.root)))


@pytest.fixture
def runs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    made = Runs(workplace / "runs")
    (made.root / "made").mkdir(parents=True)

    def states(job_ids: list[str]) -> dict[str, JobState]:
        made.asked += job_ids
        unknown = JobState("UNKNOWN", str(made.away) if made.away else "nobody knows the job")
        known = {} if made.away else made.states
        return {job_id: known.get(job_id, unknown) for job_id in job_ids}

    def find_by_token(token: str, array_index: int | None = None) -> str | None:
        made.asked.append(token)
        if made.away:
            raise made.away
        return made.tokens.get(token)

    monkeypatch.setattr(slurm, "states", states)
    monkeypatch.setattr(slurm, "find_by_token", find_by_token)
    return made


# ---------------------------------------------------------------- states


@pytest.mark.parametrize(
    ("said", "state", "note"),
    [
        (JobState("PENDING", "waiting for nodes"), "PENDING", "waiting for nodes"),
        (JobState("REQUEUE_HOLD", "held"), "PENDING", "held"),
        (JobState("RUNNING", "", "n1", 5.0), "RUNNING", ""),
        (JobState("SUSPENDED"), "RUNNING", "suspended"),
        (JobState("COMPLETING"), "RUNNING", "completing"),
        (JobState("TIMEOUT"), "TIMEOUT", "the time limit was reached; raise resources.time_min"),
        (JobState("CANCELLED"), "CANCELLED", "it was cancelled; submit it again when wanted"),
        (JobState("OUT_OF_MEMORY"), "OUT_OF_MEMORY", "Slurm ended it for using more host memory "
         "than --mem; lower the ranks per node or offload less"),
        (JobState("NODE_FAIL"), "NODE_FAIL", "its node failed; submit it again"),
        (JobState("FAILED", exit_code="1:0"), "FAILED",
         "a rank ended without a word (exit code 1:0); see hpcft logs --stderr"),
        (JobState("COMPLETED", exit_code="0:0"), "FAILED",
         "a rank ended without a word (exit code 0:0); see hpcft logs --stderr"),
        (JobState("UNKNOWN", "who knows"), "UNKNOWN", "who knows"),
    ],
)  # fmt: skip
def test_a_run_without_a_result_is_what_slurm_says(
    said: JobState, state: str, note: str, runs: Runs
) -> None:
    runs.add("aaaa0000", parts=(progress(age_s=3600),))
    runs.states = {"11": said}
    view = runs.view("aaaa0000")
    assert (view.state, view.note, view.job_id) == (state, note, "11")
    assert view.is_live == (state in ("PENDING", "RUNNING"))


@pytest.mark.parametrize("said", ["RUNNING", "FAILED", "TIMEOUT", "UNKNOWN"])
def test_a_result_means_completed_whatever_slurm_says(said: str, runs: Runs) -> None:
    runs.add("aaaa0000", parts=(record("aaaa0000", accuracy=0.9), progress(age_s=9000)))
    runs.states = {"11": JobState(said)}
    view = runs.view("aaaa0000")
    assert (view.state, view.note, view.elapsed_s) == ("COMPLETED", "", 3600.0)
    assert runs.asked == [], "nothing is asked of a run that is done"
    assert monitor.done_share(view) == 1.0


@pytest.mark.parametrize(
    ("age_s", "state", "note"),
    [(5.0, "RUNNING", f"heartbeat is fresh; {AWAY}"), (600.0, "UNKNOWN", str(AWAY))],
)
def test_with_the_scheduler_away_the_heartbeat_decides(
    age_s: float, state: str, note: str, runs: Runs
) -> None:
    runs.add("aaaa0000", parts=(progress(age_s=age_s),))
    runs.away = AWAY
    view = runs.view("aaaa0000")
    assert (view.state, view.note, view.nodes) == (state, note, "n7")


def test_many_runs_are_one_question(runs: Runs) -> None:
    for index in range(5):
        runs.add(f"aaaa000{index}", job_id=f"12_{index}")
        runs.states[f"12_{index}"] = JobState("RUNNING", nodes=f"n{index}")
    views = monitor.snapshot(store.runs_in(runs.root))
    assert [view.nodes for view in views] == ["n0", "n1", "n2", "n3", "n4"]
    assert runs.asked == sorted(runs.states)


# ---------------------------------------------------------------- orphans


def test_a_job_whose_id_was_not_noted_is_adopted_by_its_token(runs: Runs) -> None:
    runs.add("aaaa0000", job_id=None)
    runs.tokens, runs.states = {"token-aaaa0000": "77"}, {"77": JobState("RUNNING")}
    view = runs.view("aaaa0000")
    assert (view.state, view.job_id) == ("RUNNING", "77")


def test_a_job_that_slurm_never_got_was_not_queued(runs: Runs) -> None:
    runs.add("aaaa0000", job_id=None)
    view = runs.view("aaaa0000")
    assert (view.state, view.job_id) == ("FAILED", "")
    assert view.note.startswith("was not queued: the submitting command was interrupted")


def test_an_orphan_is_unknown_while_the_scheduler_is_away(runs: Runs) -> None:
    for index in range(3):
        runs.add(f"aaaa000{index}", job_id=None, array_index=index)
    runs.away = AWAY
    views = monitor.snapshot(store.runs_in(runs.root))
    assert {(view.state, view.note) for view in views} == {("UNKNOWN", str(AWAY))}
    assert len(runs.asked) == 1, "each question to an absent controller takes half a minute"


def test_a_folder_without_an_attempt_was_never_submitted(runs: Runs) -> None:
    runs.add("aaaa0000", attempts=[])
    assert runs.view("aaaa0000").note.startswith("was never submitted")


def test_a_local_run_whose_process_is_gone_has_failed(runs: Runs) -> None:
    runs.add("aaaa0000", job_id="999999999", scheduler="local", errors=(("ValueError", "no"),))
    view = runs.view("aaaa0000")
    assert (view.state, view.note) == ("FAILED", "rank 0 on n0: ValueError: no; see hpcft logs")


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("name", ["progress.json", "plan.json"])
def test_a_damaged_record_does_not_change_what_slurm_says(name: str, runs: Runs) -> None:
    paths = runs.add("aaaa0000")
    (paths.folder / name).write_text('{"of": "another version"}')
    runs.states = {"11": JobState("RUNNING")}
    view = runs.view("aaaa0000")
    assert view.state == "RUNNING"
    assert f"{name}: is damaged" in view.note
    store.write(paths.result, record("aaaa0000", accuracy=0.9))
    assert runs.view("aaaa0000").state == "COMPLETED"


def test_a_damaged_result_is_no_result(runs: Runs) -> None:
    paths = runs.add("aaaa0000")
    paths.result.write_text('{"run_id": "aaaa0000", "metr')
    runs.states = {"11": JobState("COMPLETED")}
    view = runs.view("aaaa0000")
    assert view.state == "FAILED"
    assert "result.json: is damaged" in view.note
    runs.away = AWAY
    assert runs.view("aaaa0000").state == "UNKNOWN"


# ---------------------------------------------------------------- why it failed


OOM = ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.25 GiB. GPU 0 has a total "
       "capacity of 14.74 GiB of which 1.12 GiB is free. {who}Of the allocated memory 13.01 GiB is "
       "allocated by PyTorch, and 402.51 MiB is reserved by PyTorch but unallocated.")  # fmt: skip
MINE = "Including non-PyTorch memory, this process has 13.61 GiB memory in use. "
OTHER = "Process 4711 has 9.30 GiB memory in use. "
LOGS = [
    ("foreign_memory", OOM.format(who=OTHER + MINE)),
    ("foreign_memory", OOM.format(who=MINE + OTHER)),
    ("foreign_memory", OOM.format(who=OTHER + "Process 4712 has 4.00 GiB memory in use. ")),
    ("gpu_oom", OOM.format(who=MINE)),
    ("gpu_oom", OOM.format(who=OTHER)),  # in a container: itself, by number
    ("gpu_oom", "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
    ("host_oom", "slurmstepd: error: Detected 1 oom_kill event in StepId=12.0. Some of the step "
     "tasks have been OOM Killed."),
    ("host_oom", "srun: error: n1: task 0: Out Of Memory"),
    ("host_oom", "RuntimeError: [enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: "
     "can't allocate memory: you tried to allocate 3221225472 bytes."),
    ("host_oom", "RuntimeError: DataLoader worker (pid 7) is killed by signal: Killed."),
    ("host_oom", "numpy.core._exceptions._ArrayMemoryError: Unable to allocate\nMemoryError"),
    ("disk", "OSError: [Errno 122] Disk quota exceeded: '/home/u/runs/model.part'"),
    ("disk", "safetensors_rust.SafetensorError: I/O error: No space left on device (os error 28)"),
    ("bad_node", "RuntimeError: CUDA error: uncorrectable ECC error encountered"),
    ("bad_node", "kernel: NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus."),
    ("access", "huggingface_hub.errors.LocalEntryNotFoundError: Cannot find an appropriate cached "
     "snapshot folder"),
    ("access", "OSError: We couldn't connect to 'https://huggingface.co' to load the files. Check "
     "your internet connection or see how to run the library in offline mode"),
    ("nccl", "[rank1]:[E1121 ProcessGroupNCCL.cpp:629] [Rank 1] Watchdog caught collective "
     "operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE) ran for 600012 milliseconds"),
    ("nccl", "torch.distributed.DistBackendError: NCCL error in: ../ProcessGroupNCCL.cpp:2251, "
     "unhandled system error"),
    ("nccl", "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed "
     "by peer [127.0.0.1]:3456"),
    ("nccl", "RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] "
     "Timed out waiting 1800000ms for recv operation to complete"),
    ("rank_died", "Died: the training process was ended by SIGSEGV"),
    ("interrupted", "KeyboardInterrupt: told to end"),
    ("nan", "FloatingPointError: loss is nan at step 12"),
    ("timeout", "submitit WARNING - Job not requeued because: timed-out and not checkpointable"),
]  # fmt: skip
AROUND = 'Traceback (most recent call last):\n  File "x.py", line 1, in <module>\n{}\nsrun: end\n'


@pytest.mark.parametrize("by", ["log", "errors"])
@pytest.mark.parametrize(("name", "text"), LOGS)
def test_evidence_names_the_class(name: str, text: str, by: str, runs: Runs) -> None:
    kind, _, message = text.partition(": ")
    given: Any = {"log": AROUND.format(text)} if by == "log" else {"errors": ((kind, message),)}
    paths = runs.add("aaaa0000", **given)
    ((_, job),) = store.find_run(runs.root, "aaaa0000")
    failure = failures.explain(paths, job.attempts[-1], JobState("FAILED"))
    assert failure.name == name
    assert failure.sentence
    assert failure.sentence[:60] in text, "the decisive line is shown"
    assert failure.next_step
    runs.states = {"11": JobState("FAILED")}
    assert runs.view("aaaa0000").note == str(failure)


def test_every_class_has_evidence_here() -> None:
    known = {name for name, _, _ in (*failures._CLASSES, *failures._FOLLOWED)}
    assert known == {name for name, _ in LOGS}


CLOSED = ("RuntimeError", "[gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:1")


@pytest.mark.parametrize(
    ("errors", "log", "state", "name", "says"),
    [
        # The rank that died silently is told of by Slurm; the others only lost their peer.
        (
            (CLOSED,),
            "slurmstepd: error: Detected 1 oom_kill event",
            "FAILED",
            "host_oom",
            "oom_kill",
        ),
        ((CLOSED,), "", "OUT_OF_MEMORY", "host_oom", "more host memory than --mem"),
        ((CLOSED,), "", "TIMEOUT", "timeout", "time limit"),
        ((CLOSED,), "", "FAILED", "nccl", "Connection closed by peer"),
        # A rank's own error explains more than what its peers say, or a warning in the log.
        (
            (CLOSED, ("KeyError", "'labels'")),
            "",
            "FAILED",
            "user",
            "rank 1 on n1: KeyError: 'labels'",
        ),
        ((("KeyError", "'x'"),), "NCCL WARN missing iommu", "FAILED", "user", "rank 0 on n0"),
        ((("DataError", "label: no such"),), "", "FAILED", "user", "rank 0 on n0: label: no such"),
        # The earliest of several counts.
        ((("ValueError", "first"), ("ValueError", "second")), "", "FAILED", "user", "first"),
    ],
)
def test_the_cause_comes_before_what_follows_from_it(
    errors: tuple[tuple[str, str], ...], log: str, state: str, name: str, says: str, runs: Runs
) -> None:
    paths = runs.add("aaaa0000", errors=errors, log=log)
    ((_, job),) = store.find_run(runs.root, "aaaa0000")
    failure = failures.explain(paths, job.attempts[-1], JobState(state))
    assert (failure.name, says in failure.sentence) == (name, True), failure


def test_only_the_end_of_a_long_log_is_read(runs: Runs) -> None:
    text = "CUDA out of memory\n" + "x" * 60_000 + "\nNo space left on device\n"
    paths = runs.add("aaaa0000", log=text)
    ((_, job),) = store.find_run(runs.root, "aaaa0000")
    assert failures.explain(paths, job.attempts[-1], JobState("FAILED")).name == "disk"


def test_damaged_rank_errors_and_odd_bytes_are_no_trouble(runs: Runs) -> None:
    paths = runs.add("aaaa0000", errors=(("ValueError", "told"),))
    (paths.errors / "7.json").write_text("{")
    (paths.logs / "11_1_log.err").write_bytes(b"\xff\xfe\x00" * 100)
    ((_, job),) = store.find_run(runs.root, "aaaa0000")
    assert "told" in failures.explain(paths, job.attempts[-1], JobState("FAILED")).sentence


# ---------------------------------------------------------------- rows


def add_done(runs: Runs, run_id: str, made: FullRecipe, accuracy: float, **fields: Any) -> None:
    point = fields.pop("point", {"train.seed": made.train.seed})
    runs.add(run_id, parts=(made, record(run_id, accuracy=accuracy)), point=point, **fields)


def test_seeds_are_one_row_with_mean_and_spread(runs: Runs) -> None:
    for seed, accuracy in ((1, 0.80), (2, 0.82), (3, 0.87)):
        # The third was added to the sweep later: another sweep, but the same experiment.
        sweep = "sweep-1" if seed < 3 else "sweep-2"
        add_done(runs, f"aaaa000{seed}", recipe(seed), accuracy, sweep_id=sweep)
    (row,) = runs.rows()
    assert row.run_ids == ["aaaa0001", "aaaa0002", "aaaa0003"]
    assert row.point == {}
    header, (cells,) = collect.table([row])
    shown = dict(zip(header, cells, strict=True))
    assert shown["accuracy"] == "0.8300 ± 0.0361 (n=3)"  # by hand: √((9 + 1 + 16)e-4 / 2)
    assert shown["time"] == "1:00:00"
    assert shown["GPU hours"] == "6.0000"
    assert (shown["memory predicted"], shown["memory measured"]) == ("4 GiB", "3 GiB")
    assert (shown["parameters"], shown["trainable"]) == ("66.4 M", "592 K")


def test_intervals_directions_and_confusion_are_shown(runs: Runs) -> None:
    counts = Confusion(labels=["a", "b"], counts=[[8, 2], [1, 9]])
    result = record("aaaa0001", accuracy=0.85, perplexity=3.0).model_copy(
        update={"intervals": {"accuracy": (0.7, 0.95)}, "confusion": counts}
    )
    runs.add("aaaa0001", parts=(recipe(1), result))
    header, (cells,) = collect.table(runs.rows())
    shown = dict(zip(header, cells, strict=True))
    assert (shown["accuracy"], shown["perplexity"]) == ("0.8500 [0.7000, 0.9500]", "3.0000")
    assert {"accuracy ↑", "perplexity ↓", "recipe"} <= set(collect.with_arrows(header))
    told = collect.as_json(runs.rows()[0])
    assert told["metrics"]["accuracy"]["intervals"] == [(0.7, 0.95)]
    assert told["confusion"] == [{"labels": ["a", "b"], "counts": [[8, 2], [1, 9]]}]


def test_points_stay_apart(runs: Runs) -> None:
    for index, rate in enumerate((1e-4, 2e-4)):
        for seed in (1, 2):
            add_done(runs, f"aaaa00{index}{seed}", recipe(seed, rate), 0.8 + index / 100,
                     point={"train.learning_rate": rate, "train.seed": seed})  # fmt: skip
    rows = runs.rows()
    assert [row.point for row in rows] == [
        {"train.learning_rate": 1e-4}, {"train.learning_rate": 2e-4},
    ]  # fmt: skip
    assert [len(row.run_ids) for row in rows] == [2, 2]
    _, cells = collect.table(rows)
    assert [line[1] for line in cells] == ["learning_rate=0.0001", "learning_rate=0.0002"]


def test_other_clusters_and_other_data_are_no_repeats(runs: Runs) -> None:
    add_done(runs, "aaaa0001", recipe(1), 0.8)
    add_done(runs, "aaaa0002", recipe(2), 0.8, cluster="elsewhere")
    data = {"name": "classification", "labels": ["a", "c"], "data": {"path": "x/y"}}
    add_done(runs, "aaaa0003", recipe(3, task=data), 0.8)
    rows = runs.rows()
    assert [len(row.run_ids) for row in rows] == [1, 1, 1]
    assert [row.point for row in rows] == [{"train.seed": 1}, {"train.seed": 2}, {"train.seed": 3}]


def test_what_failed_is_shown_with_its_reason(runs: Runs) -> None:
    add_done(runs, "aaaa0001", recipe(1), 0.8)
    runs.add("aaaa0002", parts=(recipe(2), plan()), job_id="12", point={"train.seed": 2},
             log=OOM.format(who=MINE))  # fmt: skip
    runs.add("aaaa0003", parts=(recipe(3),), job_id="13", point={"train.seed": 3})
    runs.states = {"12": JobState("FAILED"), "13": JobState("PENDING", "waiting")}
    rows = runs.rows()
    assert [row.state for row in rows] == ["COMPLETED", "FAILED", "PENDING"]
    header, cells = collect.table(rows)
    failed = dict(zip(header, cells[1], strict=True))
    assert failed["accuracy"] == ""
    assert failed["point"] == "seed=2"
    assert "CUDA out of memory" in failed["note"]
    assert (failed["memory predicted"], failed["parameters"]) == ("70 GiB", "8.54 B")
    assert cells[2][header.index("note")] == "waiting"


def test_baseline_and_before_stand_beside_ours(runs: Runs) -> None:
    reported = Baseline(source="R1", metrics={"accuracy": 0.9382}, outcome="out of memory")
    made = recipe(1).model_copy(update={"baseline": reported})
    result = record("aaaa0001", accuracy=0.91, f1=0.9, majority=0.5, obscure=1.0)
    scored = result.model_copy(update={"metrics_before": {"accuracy": 0.5123}, "notes": ["cut"]})
    runs.add("aaaa0001", parts=(made, scored))
    header, (cells,) = collect.table(runs.rows())
    shown = dict(zip(header, cells, strict=True))
    assert shown["accuracy"] == "0.9100"
    assert shown["accuracy before"] == "0.5123"
    assert shown["accuracy reported"] == "0.9382"
    assert (shown["reported outcome"], shown["source"]) == ("out of memory", "R1")
    assert shown["note"] == "cut"
    assert header.index("accuracy reported") < header.index("majority") < header.index("f1")
    assert "f1 before" not in header, "what no row fills is left out"
    assert "obscure" not in header
    chosen, _ = collect.table(runs.rows(), ["obscure"])
    assert "obscure" in chosen
    assert "accuracy" not in chosen
    with pytest.raises(UsageError, match="no run has the metric f2; there are: accuracy, f1"):
        collect.table(runs.rows(), ["f2"])


def test_a_run_without_a_readable_recipe_is_shown_too(runs: Runs) -> None:
    paths = runs.add("aaaa0001", parts=(record("aaaa0001", accuracy=0.5),))
    paths.recipe.write_text("{")
    (row,) = runs.rows()
    assert row.metrics == {"accuracy": [0.5]}


# ---------------------------------------------------------------- pages


HEADER = ["recipe", "note"]
CELLS = [["made", 'a "b", c\nd | e\tf'], ["x_1 & 50% #$~^\\{}", "0.8 ± 0.1\n\n× 2"]]


def test_tsv_has_a_line_a_row() -> None:
    lines = report.as_tsv(HEADER, CELLS).split("\n")
    assert [line.split("\t") for line in lines] == [
        HEADER, ["made", 'a "b", c d | e f'], ["x_1 & 50% #$~^\\{}", "0.8 ± 0.1 × 2"],
    ]  # fmt: skip
    assert report.as_tsv(["a"], [["x\u2028y\x0bz\r"]]) == "a\nx y z"


def test_csv_reads_back_as_it_was() -> None:
    text = report.as_csv(HEADER, CELLS)
    assert list(csv.reader(io.StringIO(text), strict=True)) == [HEADER, *CELLS]
    assert text.startswith('recipe,note\nmade,"a ""b"", c\nd | e\tf"\n')


def test_markdown_escapes_pipes() -> None:
    lines = report.as_markdown(HEADER, CELLS).split("\n")
    assert lines[:3] == ["| recipe | note |", "| --- | --- |", '| made | a "b", c d \\| e f |']
    assert len(lines) == 4


def test_latex_escapes_what_is_special() -> None:
    lines = report.as_latex(HEADER, CELLS).split("\n")
    assert lines[0] == r"\begin{tabular}{ll}"
    assert lines[4] == r'made & a "b", c d | e f \\'
    assert lines[5] == (
        r"x\_1 \& 50\% \#\$\textasciitilde{}\textasciicircum{}\textbackslash{}\{\} & "
        r"0.8 $\pm$ 0.1 $\times$ 2 \\"
    )
    assert lines[6:] == [r"\bottomrule", r"\end{tabular}"]


# ---------------------------------------------------------------- the command line


@pytest.fixture
def three(runs: Runs) -> Runs:
    """One run done, one running, one failed."""
    reported = recipe(1).model_copy(update={"baseline": Baseline(source="R1", metrics={"f1": 0.7})})
    runs.add("aaaa0001", parts=(reported, record("aaaa0001", accuracy=0.91)))
    runs.add("aaaa0002", parts=(recipe(2, 1e-5), progress()), job_id="12",
             point={"train.learning_rate": 1e-5})  # fmt: skip
    runs.add("aaaa0003", parts=(recipe(3, 1e-6),), job_id="13",
             errors=(("ValueError", "two\nlines\tand a tab"),))  # fmt: skip
    runs.states = {"12": JobState("RUNNING", nodes="n7", elapsed_s=93784.0),
                   "13": JobState("FAILED", exit_code="1:0")}  # fmt: skip
    return runs


def test_status_for_programs(three: Runs, cli: Cli) -> None:
    said = cli("status", "--json")
    assert (said.code, said.err) == (0, "")
    done, running, failed = said.json
    assert (done["state"], running["state"], failed["state"]) == ("COMPLETED", "RUNNING", "FAILED")
    assert running["progress"]["loss"] == 0.51234
    assert running["elapsed_s"] == 93784.0
    assert running["folder"] == str(three.root.relative_to(Path.cwd()) / "made" / "aaaa0002")
    assert failed["note"].startswith("rank 0 on n0: ValueError: two")
    assert done["progress"] is None


def test_status_in_a_pipe_is_tsv(three: Runs, cli: Cli) -> None:
    said = cli("status")
    header, *lines = [line.split("\t") for line in said.out.splitlines()]
    assert header == [column.title for column in monitor.COLUMNS]
    assert [len(line) for line in lines] == [len(header)] * 3
    shown = dict(zip(header, lines[1], strict=True))
    assert shown | {"note": ""} == {
        "run": "made/aaaa0002", "point": "learning_rate=1e-05", "cluster": "site", "job": "12",
        "state": "RUNNING", "nodes": "n7", "elapsed": "26:03:04", "progress": "██░░░░░░░░ 25%",
        "step": "30/120", "loss": "0.5123", "tokens/s": "12,346", "memory (peak)": "1 GiB (2 GiB)",
        "ETA": "1:15", "note": "",
    }  # fmt: skip
    assert "\x1b" not in said.out


def test_status_of_one_run_and_of_none(three: Runs, cli: Cli) -> None:
    assert [v["run_id"] for v in cli("status", "13", "--json").json] == ["aaaa0003"]
    missing = cli("status", "nope")
    assert missing.code == 2
    assert "no run 'nope' in runs" in missing.err
    empty = cli("status", "--json", "--runs-dir", "elsewhere")
    assert (empty.code, empty.json) == (0, [])


def test_collect_for_programs_is_complete(three: Runs, cli: Cli) -> None:
    done, running, failed = cli("collect", "--json").json
    in_metrics = {"intervals"}  # they stand with their metric
    assert set(done) == set(collect.Row.__dataclass_fields__) - in_metrics
    assert done["metrics"] == {"accuracy": {"mean": 0.91, "stdev": None, "values": [0.91]}}
    assert done["baseline"] == {"f1": 0.7}
    assert (done["total_parameters"], done["peak_memory_bytes"]) == (66_364_418, 3 * GIB)
    assert (running["state"], failed["state"]) == ("RUNNING", "FAILED")
    assert cli("collect", "--format", "json").json == [done, running, failed]


READERS: dict[str, Callable[[str], list[list[str]]]] = {
    "table": lambda text: [line.split("\t") for line in text.splitlines()],
    "tsv": lambda text: [line.split("\t") for line in text.splitlines()],
    "csv": lambda text: list(csv.reader(io.StringIO(text), strict=True)),
    "md": lambda text: [line.strip("| ").split(" | ") for line in text.splitlines()],
}


@pytest.mark.parametrize("name", READERS)
def test_collect_formats(name: str, three: Runs, cli: Cli) -> None:
    said = cli("collect", "--format", name)
    assert said.code == 0
    header, *lines = READERS[name](said.out)
    assert header[:4] == ["recipe", "point", "state", "split"]
    assert header[4] == ("accuracy ↑" if name == "md" else "accuracy")
    rows = lines[1:] if name == "md" else lines
    assert [line[2] for line in rows] == ["COMPLETED", "RUNNING", "FAILED"]
    assert rows[0][4] == "0.9100"


def test_collect_as_latex_and_what_is_no_format(three: Runs, cli: Cli) -> None:
    text = cli("collect", "--format", "latex").out
    assert text.count(r"\\") == 4
    refused = cli("collect", "--format", "xml")
    assert refused.code == 2
    assert "expected one of table, json, tsv, csv, md, latex" in refused.err
    absent = cli("collect", "-m", "bleu")
    assert absent.code == 2
    assert "no run has the metric bleu" in absent.err


# ---------------------------------------------------------------- the reference page


@pytest.mark.parametrize(("kind", "root"), [("recipe", FullRecipe), ("cluster", Cluster)])
def test_the_reference_page_has_every_field(kind: str, root: Any) -> None:
    schema = reference.schema(kind)
    json.dumps(schema)
    page = reference.page(kind)
    parts = {schema["title"]: schema, **schema.get("$defs", {})}
    assert set(root.model_fields) <= set(schema["properties"])
    for title, part in parts.items():
        if "properties" not in part:
            continue
        section = page.partition(f"## {title}\n")[2].partition("\n## ")[0]
        rows = [line for line in section.splitlines() if line.startswith("| `")]
        assert [row.split("`")[1] for row in rows] == list(part["properties"]), title
        for row in rows:
            meaning = row.replace(r"\|", "").split(" | ")[-1].rstrip(" |")
            assert meaning, f"{title}: {row} says nothing"
