"""The ladder's last rung, more nodes: what is planned, queued once, learned, and a real run."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from conftest import ROOT, Cli, film_rows, write_rows
from hpcft import calibration, collect, ladder, monitor, more_nodes, recoveries, store
from hpcft import plan as planner
from hpcft.cluster import slurm
from hpcft.errors import ClusterError
from hpcft.failures import RankError, rank_errors
from hpcft.memory import parameters
from hpcft.paths import RunPaths, calibration_file
from hpcft.recipe import FullRecipe
from hpcft.records import (
    Attempt,
    Calibration,
    Cluster,
    Gpu,
    Job,
    Layout,
    Lowered,
    Plan,
    Recovery,
    RunRecord,
)
from hpcft.train.start import Rank
from hpcft.train.supervisor import Supervisor

SMALL = {"model_type": "bert", "vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 1,
         "num_attention_heads": 2, "intermediate_size": 64,
         "max_position_embeddings": 64}  # fmt: skip


def recipe(**sections: Any) -> FullRecipe:
    made: dict[str, Any] = {
        "name": "made", "model": {"config": SMALL, "tokenizer": {"vocab_size": 400}},
        "task": {"name": "classification", "labels": ["a", "b"], "data": {"path": "x/y"},
                 "max_length": 32},
        "method": {"name": "full"}, "train": {"global_batch_size": 16}, **sections,
    }  # fmt: skip
    return FullRecipe.model_validate(made)


def site(**changes: Any) -> Cluster:
    fields: dict[str, Any] = {
        "name": "site", "scheduler": "slurm", "accelerator": "cpu", "max_nodes": 4,
        "cores_per_node": 8, "host_memory_gib": 8.0, **changes,
    }  # fmt: skip
    return Cluster(**fields)


def layout(nodes: int, **changes: Any) -> Layout:
    fields: dict[str, Any] = {
        "nodes": nodes, "ranks_per_node": 1, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 16 // nodes, "gradient_checkpointing": True,
        "zero_stage": 0, "offload_optimizer": "none", "offload_param": "none",
    }  # fmt: skip
    return Layout(**(fields | changes))


def at_the_end(made: FullRecipe, there: Cluster, first: Layout) -> Plan:
    """A plan of which nothing is left to lower on its nodes."""
    facts = parameters.facts(made.model, made.task, made.method)
    plan = ladder.with_layout(planner.make(made, there, facts), first, 1, made, there)
    assert ladder.step_down(plan, made, there, "step") is None
    return plan


# ---------------------------------------------------------------- what is planned


def test_each_time_the_run_takes_more_nodes_until_the_profile_has_no_more() -> None:
    made, there = recipe(), site()
    now: Plan | None = at_the_end(made, there, layout(1))
    told = []
    while now is not None:
        new = more_nodes.planned(now, made, there)
        if new is not None:
            after = new.layout
            assert after.per_device_train_batch_size == 1
            assert after.gradient_accumulation_steps * after.world_size == 16
            assert after.gradient_checkpointing
            assert after.zero_stage >= max(now.layout.zero_stage, 1)
            assert new.per_device_eval_batch_size == 1
            assert new.mem_mib >= now.mem_mib, "what was too little is not lowered"
            assert new.ds_config is not None
            assert new.ds_config["train_batch_size"] == 16
            told.append(ladder.change(now, new))
        now = new
    assert told == ["1 → 2 nodes, no sharding → ZeRO-1, queued anew", "2 → 4 nodes, queued anew"]


@pytest.mark.parametrize(
    ("sections", "changes"),
    [
        ({"resources": {"nodes": 1}}, {}),  # a person's word
        ({"resources": {"zero_stage": 0}}, {}),  # unsharded, each node would hold it all
        ({}, {"max_nodes": 1}),
        ({}, {"scheduler": "local"}),
        ({"train": {"global_batch_size": 1}}, {}),  # a rank needs an example
    ],
)
def test_where_more_nodes_are_not_for_the_run_to_take(
    sections: dict[str, Any], changes: dict[str, Any]
) -> None:
    made, there = recipe(**sections), site(**changes)
    batch = made.train.global_batch_size
    first = layout(1, gradient_accumulation_steps=batch)
    assert more_nodes.planned(at_the_end(made, there, first), made, there) is None


def test_several_nodes_are_whole_ones() -> None:
    """A run that began on one of four GPUs does not take one GPU of each of two nodes."""
    gpu = Gpu(name="A", memory_gib=40.0, compute_capability=8.0)
    there = site(accelerator="cuda", gpu=gpu, gpus_per_node=4, host_memory_gib=500.0)
    first = layout(1, zero_stage=3, offload_optimizer="cpu", offload_param="cpu")
    made = recipe()
    before = at_the_end(made, there, first)
    after = more_nodes.planned(before, made, there)
    assert after is not None
    assert ladder.change(before, after) == "1 → 2 nodes, 1 → 4 ranks on each, queued anew"
    assert (after.layout.offload_optimizer, after.layout.offload_param) == ("cpu", "cpu")


# ---------------------------------------------------------------- what later plans learn


def rung(
    number: int, laid: Layout, how: recoveries.How = "restarted", job_id: str = "1"
) -> Recovery:
    return Recovery(number=number, at=1.0, cause="out_of_memory", job_id=job_id, rank=0, node="n",
                change=f"rung {number}",
                evidence="", how=how, layout=laid, per_device_eval_batch_size=1)  # fmt: skip


def record(*steps: Recovery) -> RunRecord:
    return RunRecord(
        run_id="a" * 8, recipe="made", cluster="site", finished_at=1.0, recoveries=[*steps]
    )


def test_nodes_and_a_loss_in_parts_are_learned() -> None:
    alone = record(rung(1, layout(1, per_device_train_batch_size=4, loss_chunks=8)))
    wider = record(rung(1, layout(1)), rung(2, layout(2, zero_stage=1), "queued anew"))
    planned_wide = record(rung(1, layout(4, zero_stage=1)))
    cap = {"per_device_train_batch_size": 1, "gradient_checkpointing": True}
    assert ladder.lowered([alone, wider], "made", "site") == Lowered(**cap, loss_chunks=8, nodes=2)
    assert ladder.lowered([planned_wide], "made", "site") == Lowered(**cap), "it was never too few"


def test_a_run_without_a_result_is_learned_from_too() -> None:
    ended = collect.Unfinished("made", "site", (rung(1, layout(1, loss_chunks=8)),))
    cap = Lowered(per_device_train_batch_size=1, gradient_checkpointing=True, loss_chunks=8)
    fitted = calibration.fit([], "site", [ended])
    assert (fitted.lowered, fitted.runs) == ({"made": cap}, 0)
    assert calibration.fit([], "elsewhere", [ended]).lowered == {}


def test_a_failed_run_lowers_the_next_plan(workplace: Path) -> None:
    (folder := workplace / "runs/made/aaaa0000").mkdir(parents=True)
    paths = RunPaths(folder)
    paths.recoveries.mkdir()
    attempt = Attempt(job_id="999999999", token="t", submitted_at=1.0, logs=str(paths.logs),
                      host=os.uname().nodename, process_started=1.0)  # fmt: skip
    store.write(paths.job, Job(run_id="aaaa0000", recipe="made", cluster="site",
                               scheduler="local", attempts=[attempt]))  # fmt: skip
    store.write(paths.recoveries / "1.json", rung(1, layout(1)))
    root = workplace / "runs"
    views = monitor.snapshot(store.runs_in(root))
    assert [view.state for view in views] == ["FAILED"]
    assert collect.learn(views, root) == [
        "calibration of site by 0 runs: made came down to micro-batch 1, checkpointing"
    ]
    known = store.read(calibration_file(root, "site"), Calibration)
    assert "made" in known.lowered


def shapes(made: FullRecipe, there: Cluster, **cap: Any) -> list[Layout]:
    """All layouts that are left to a recipe of which earlier runs came down."""
    least = {"per_device_train_batch_size": 64, "gradient_checkpointing": False} | cap
    known = Calibration(lowered={"made": Lowered.model_validate(least)})
    held = there.model_copy(update={"calibration": known})
    found = list(planner.layouts(made, there, loss_in_parts=True))
    return ladder.held_down(found, made, held)


def test_plans_are_held_to_what_earlier_runs_needed() -> None:
    made, there = recipe(), site()
    nodes = {(x.nodes, x.zero_stage > 0) for x in shapes(made, there, nodes=2)}
    assert nodes == {(2, True), (4, True)}
    assert {x.loss_chunks for x in shapes(made, there)} == {1, 8}
    assert {x.loss_chunks for x in shapes(made, there, loss_chunks=8)} == {8}
    both = shapes(made, there, loss_chunks=8, nodes=4, per_device_train_batch_size=2)
    assert {(x.nodes, x.loss_chunks) for x in both} == {(4, 8)}
    assert {x.per_device_train_batch_size for x in both} == {1, 2}


@pytest.mark.parametrize(
    ("sections", "changes", "cap"),
    [
        ({"resources": {"nodes": 1}}, {}, {"nodes": 2}),
        ({}, {"max_nodes": 1}, {"nodes": 2}),
        ({"train": {"global_batch_size": 16, "per_device_train_batch_size": 8}}, {},
         {"per_device_train_batch_size": 2}),
        ({"train": {"global_batch_size": 16, "gradient_checkpointing": False}}, {},
         {"gradient_checkpointing": True}),
    ],
)  # fmt: skip
def test_never_against_what_recipe_and_profile_fix(
    sections: dict[str, Any], changes: dict[str, Any], cap: dict[str, Any]
) -> None:
    made, there = recipe(**sections), site(**changes)
    assert shapes(made, there, **cap) == list(planner.layouts(made, there, loss_in_parts=True))


def test_a_plan_says_what_it_learned() -> None:
    cap = Lowered(per_device_train_batch_size=2, gradient_checkpointing=False, nodes=2)
    there = site(calibration=Calibration(lowered={"made": cap}))
    assert calibration.reasons(recipe(), there) == [
        "micro-batch at most 2, at least 2 nodes: earlier runs of made were out of memory and "
        "came down to it"
    ]


# ---------------------------------------------------------------- queued once, on a real Slurm


class Queued(NamedTuple):
    """A run whose job sleeps, at the end of its ladder."""

    paths: RunPaths
    plan: Plan
    wider: Plan
    cluster: Cluster
    job_id: str

    def job(self) -> Job:
        return store.read(self.paths.job, Job)

    def queue(self, **changes: Any) -> str:
        cluster = self.cluster.model_copy(update=changes)
        return more_nodes.queue(self.paths, self.wider, cluster, self.job_id)


def live_jobs() -> dict[str, str]:
    """Job id to nodes of what is queued or runs of it."""
    states = "PENDING,CONFIGURING,RUNNING"
    done = subprocess.run(["squeue", "-h", "-r", "-t", states, "-n", "tiny", "-o", "%i %D"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    return dict(line.split() for line in done.stdout.splitlines())


@pytest.fixture
def queued(tiny: Path, cli: Cli, testbed: Any) -> Iterator[Queued]:
    """The second run of a sweep: an element of a job array."""
    shipped = (ROOT / "slurm/testbed.yaml").read_text().replace("name: testbed", "name: sleepy")
    Path("sleepy.yaml").write_text(shipped + 'setup: ["sleep 100"]\n')
    submitted = cli("submit", tiny, "-c", "sleepy.yaml", "-o", "resources.nodes=auto",
                    "-o", "sweep.seeds=[1, 2]")  # fmt: skip
    assert submitted.code == 0, submitted.err
    (_, _), (paths, job) = store.runs_in(Path("runs").absolute())
    (attempt,) = job.attempts
    assert attempt.job_id is not None
    plan, cluster = store.read(paths.plan, Plan), store.read(paths.cluster, Cluster)
    made = store.read(paths.recipe, FullRecipe)
    bottom = ladder.with_layout(plan, layout(1, gradient_accumulation_steps=4), 1, made, cluster)
    wider = more_nodes.planned(bottom, made, cluster)
    assert wider is not None
    run = Queued(paths, plan, wider, cluster, attempt.job_id)
    who = RankError(rank=0, node="n1", at=1.0, kind="X", message="no", job_id=run.job_id)
    recoveries.take(paths, plan, wider, number=1, how="queued anew", who=who)
    yield run
    for job_id in live_jobs():
        slurm.cancel(job_id)


@pytest.mark.slurm
def test_a_run_is_queued_anew_once(queued: Queued, monkeypatch: pytest.MonkeyPatch) -> None:
    # As within a job, of which the new one may inherit nothing.
    monkeypatch.setenv("SLURM_CPU_BIND", "quiet,mask_cpu:0x1")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    array, _, index = queued.job_id.partition("_")
    assert index == "1"
    paths, before = queued.paths, queued.job()
    store.write_json(paths.progress, {"phase": "training", "updated_at": 1, "started_at": 1})
    with pytest.raises(slurm.Refused, match=r"[Aa]ccount"):
        queued.queue(account="nobody")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "/nowhere")
        with pytest.raises(ClusterError, match="sbatch is not on PATH"):
            queued.queue()
    assert queued.job() == before
    assert store.read(paths.plan, Plan) == queued.plan

    new = queued.queue()
    assert "_" not in new, "of an array only this element, singly"
    assert os.environ["SLURM_NTASKS"] == "1"
    first, second = queued.job().attempts
    assert (first.job_id, second.job_id, second.array_index) == (queued.job_id, new, None)
    assert store.read(paths.plan, Plan) == queued.wider
    assert not paths.progress.exists()
    assert store.read(paths.earlier / "0/plan.json", Plan) == queued.plan
    assert live_jobs() == {f"{array}_0": "1", f"{array}_1": "1", new: "2"}
    view = monitor.look(paths, queued.job())
    assert (view.job_id, view.is_live) == (new, True)

    assert queued.queue() == new, "asked again, it is found"
    noted = second.model_copy(update={"job_id": None})
    store.write(paths.job, queued.job().model_copy(update={"attempts": [first, noted]}))
    assert queued.queue() == new, "by its token too, had its id not been noted"
    assert queued.job().attempts == [first, second]
    assert len(live_jobs()) == 3


@pytest.mark.slurm
def test_between_its_two_jobs_a_run_has_not_failed(queued: Queued) -> None:
    """The token is noted, sbatch has not answered yet, and the first job waits for that."""
    first = queued.job().attempts[0]
    coming = first.model_copy(update={"job_id": None, "token": "hpcft-x", "array_index": None})
    job = queued.job().model_copy(update={"attempts": [first, coming]})
    view = monitor.look(queued.paths, job)
    assert (view.job_id, view.is_live) == (queued.job_id, True)
    slurm.cancel(queued.job_id)
    deadline = time.monotonic() + 20
    while monitor.look(queued.paths, job).is_live and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not monitor.look(queued.paths, job).is_live


def two_ranks(run: Queued) -> list[Supervisor]:
    """The supervisors of a job's ranks, when their children have ended."""
    run.paths.errors.mkdir(exist_ok=True)
    error = RankError(rank=0, node="n1", at=1.0, kind="X", message="no", phase="training")
    store.write(run.paths.errors / "0.json", error)
    ranks = [Rank(rank, 2, rank, "n1", run.job_id) for rank in range(2)]
    return [Supervisor(run.paths, me) for me in ranks]


def end_of(supervisors: list[Supervisor], rung: Recovery) -> list[int]:
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda one: one._leave(rung), supervisors))


@pytest.mark.slurm
def test_one_rank_queues_it_and_all_end(queued: Queued, monkeypatch: pytest.MonkeyPatch) -> None:
    (rung,) = recoveries.taken(queued.paths)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "/nowhere")
        assert end_of(two_ranks(queued), rung) == [1, 1]
    assert recoveries.taken(queued.paths) == [], "it was not taken after all"
    (error,) = rank_errors(queued.paths)
    assert (error.failure, error.message) == (
        "out_of_memory", "rank 0 on n1 was out of memory (training): no; there is no lower rung"
    )  # fmt: skip
    assert error.next_step.startswith(
        "set resources.nodes: 2 and submit it again (it could not do so itself: sbatch is not on"
    )
    store.write(queued.paths.recoveries / "1.json", rung)
    store.write(queued.paths.effective_plan, queued.wider)
    assert end_of(two_ranks(queued), rung) == [0, 0]
    assert end_of(two_ranks(queued), rung) == [0, 0], "started again by Slurm, it ends again"
    assert len(queued.job().attempts) == 2
    assert len(live_jobs()) == 3


# ---------------------------------------------------------------- a real run


# Weights, gradients and AdamW's states of 27 M parameters are 0.5 GiB, on each of two nodes half.
DEEP = """\
name: deep
model:
  config: { model_type: bert, vocab_size: 400, hidden_size: 512, intermediate_size: 2048,
            num_hidden_layers: 8, num_attention_heads: 4, max_position_embeddings: 64,
            hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0 }
  tokenizer: { vocab_size: 400 }
task:
  name: classification
  data: { files: { train: train.jsonl, test: test.jsonl } }
  labels: [bad, good]
  max_length: 32
method: { name: full }
train: { global_batch_size: 4, max_steps: 2, logging_steps: 1, learning_rate: 1e-5,
         gradient_checkpointing: true, train_sampling_strategy: sequential, eval_strategy: "no" }
resources: { time_min: 10, zero_stage: 3 }
"""
# Between what one node needs and what each of two does.
LIMIT_MIB = 2_500
# Both sum the same numbers in fp32, in another order.
TOLERANCE = 1e-5


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines(folder) if "loss" in line]


@pytest.mark.slow
@pytest.mark.slurm
def test_a_run_that_one_node_cannot_hold_ends_on_two(
    workplace: Path, cli: Cli, testbed: Any
) -> None:
    """Its profile boasts of memory; the same run without a limit stays on one node."""
    write_rows(workplace / "train.jsonl", film_rows(8))
    write_rows(workplace / "test.jsonl", film_rows(2))
    Path("deep.yaml").write_text(DEEP)
    shipped = (ROOT / "slurm/testbed.yaml").read_text()
    limits = f'setup: ["ulimit -S -d {LIMIT_MIB * 1024}"]\n'  # in KiB
    Path("boasting.yaml").write_text(shipped.replace("name: testbed", "name: boasting") + limits)
    common = ["submit", "deep.yaml", "-o", "resources.gpus_per_node=1"]
    for name, more in (
        ("boasting.yaml", ["-o", "train.per_device_train_batch_size=1"]),
        ("testbed", ["-o", "name=honest", "-o", "resources.nodes=auto"]),
    ):
        said = cli(*common, "-c", name, *more)
        assert said.code == 0, said.err
    watched = cli("status", "--watch")
    assert watched.code == 0, watched.err
    assert "FAILED" not in watched.err
    (boasting,), (honest,) = Path("runs/deep").glob("*"), Path("runs/honest").glob("*")
    (step,) = recoveries.taken(RunPaths(boasting))
    first, second = store.read(boasting / "job.json", Job).attempts
    assert (step.change, step.how) == ("1 → 2 nodes, queued anew", "queued anew")
    assert step.job_id == first.job_id
    result = store.read(boasting / "result.json", RunRecord)
    assert (result.job_id, result.rungs) == (second.job_id, [step])
    assert lines(boasting)[0]["kind"] == "rung", "what follows began anew"
    assert not recoveries.taken(RunPaths(honest))
    assert len(store.read(honest / "job.json", Job).attempts) == 1
    assert losses(boasting)[-2:] == pytest.approx(losses(honest), rel=TOLERANCE)
    (row,) = cli("collect", "deep", "--json").json
    assert (row["state"], row["rungs"]) == ("COMPLETED", ["1 → 2 nodes, queued anew"])
    cli("collect")
    next_plan = cli("plan", "deep.yaml", "-c", "boasting.yaml", "--json").json
    assert next_plan["layout"]["nodes"] == 2
