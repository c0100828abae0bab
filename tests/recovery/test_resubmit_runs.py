"""Tests of resubmitting a run on more nodes, on a real Slurm."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from builders import ROOT, Cli, film_rows, layout, write_rows
from hpcft.core import run_index
from hpcft.core.errors import ClusterError
from hpcft.core.files import read_record, write_json, write_record
from hpcft.core.paths import RunPaths
from hpcft.core.rank_errors import read_rank_errors
from hpcft.core.records import Job, Plan, RankError, Recovery, RunRecord
from hpcft.jobs import status
from hpcft.planning import oom_fallback
from hpcft.recovery.log import append_recovery, read_recoveries
from hpcft.recovery.replan import plan_on_more_nodes
from hpcft.recovery.resubmit import resubmit
from hpcft.recovery.run import Run
from hpcft.scheduler import slurm_commands
from hpcft.scheduler.protocol import Refused
from hpcft.training.distributed.rank_env import RankInfo
from hpcft.training.supervision.supervisor import Supervisor
from real_runs import losses, metrics_lines, until

pytestmark = pytest.mark.slurm

# ---------------------------------------------------------------- a job that sleeps


class Sleeping(NamedTuple):
    """A run whose job sleeps, with a recovery that resubmits it on more nodes."""

    run: Run
    submitted: Plan
    """Plan of the job that sleeps."""
    wider: Plan
    """Plan on more nodes, with the number of its recovery."""
    job_id: str

    def resubmit(self, **changes: Any) -> str:
        """Resubmits the run; `changes` are fields of its profile."""
        cluster = self.run.cluster.model_copy(update=changes)
        return resubmit(replace(self.run, cluster=cluster), self.wider, self.job_id)


def live_jobs() -> dict[str, str]:
    """Number of nodes of each job of the recipe that is queued or runs, by id."""
    states = "PENDING,CONFIGURING,RUNNING"
    done = subprocess.run(["squeue", "-h", "-r", "-t", states, "-n", "tiny", "-o", "%i %D"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    return dict(line.split() for line in done.stdout.splitlines())


@pytest.fixture
def sleeping(tiny: Path, cli: Cli, testbed: Any) -> Iterator[Sleeping]:
    """The second run of a sweep: an element of a job array."""
    shipped = (ROOT / "slurm/testbed.yaml").read_text().replace("name: testbed", "name: sleepy")
    Path("sleepy.yaml").write_text(shipped + 'setup: ["sleep 100"]\n')
    submitted = cli("submit", tiny, "-c", "sleepy.yaml", "-o", "resources.nodes=auto",
                    "-o", "sweep.seeds=[1, 2]")  # fmt: skip
    assert submitted.code == 0, submitted.err
    _, second = run_index.list_runs(Path("runs").absolute())
    (attempt,) = second.job.attempts
    assert attempt.job_id is not None
    run = Run.open(second.paths.folder)
    plan = read_record(run.paths.plan, Plan)
    smallest = layout(0, gradient_accumulation_steps=4, gradient_checkpointing=True)
    last = oom_fallback.with_layout(plan, smallest, 1, recipe=run.recipe, cluster=run.cluster)
    wider = plan_on_more_nodes(last, run.recipe, run.cluster)
    assert wider is not None
    error = RankError.now(0, "X", "no", node="n1", job_id=attempt.job_id)
    append_recovery(run.paths, plan, wider, number=1, action="resubmit", error=error)
    numbered = wider.model_copy(update={"recovery_number": 1})
    yield Sleeping(run, plan, numbered, attempt.job_id)
    for job_id in live_jobs():
        slurm_commands.cancel(job_id)


def test_resubmit_submits_one_job_however_often_it_is_called(
    sleeping: Sleeping, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A job has such variables; the new job must not inherit them.
    monkeypatch.setenv("SLURM_CPU_BIND", "quiet,mask_cpu:0x1")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    array, _, index = sleeping.job_id.partition("_")
    assert index == "1"
    run, paths = sleeping.run, sleeping.run.paths
    before = run.read_job()
    write_json(paths.progress, {"phase": "training", "updated_at": 1, "started_at": 1})
    with pytest.raises(Refused, match=r"[Aa]ccount"):
        sleeping.resubmit(account="nobody")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "/nowhere")
        with pytest.raises(ClusterError, match="sbatch is not on PATH"):
            sleeping.resubmit()
    assert run.read_job() == before
    assert read_record(paths.plan, Plan) == sleeping.submitted

    new_id = sleeping.resubmit()
    assert "_" not in new_id, "only this element of the array is resubmitted"
    assert os.environ["SLURM_NTASKS"] == "1"
    first, second = run.read_job().attempts
    assert (first.job_id, second.job_id, second.array_index) == (sleeping.job_id, new_id, None)
    assert read_record(paths.plan, Plan) == sleeping.wider
    assert read_record(paths.current_plan, Plan) == sleeping.wider
    assert run.read_plan() == sleeping.wider
    assert not paths.progress.exists()
    assert read_record(paths.previous / "0/plan.json", Plan) == sleeping.submitted
    assert live_jobs() == {f"{array}_0": "1", f"{array}_1": "1", new_id: "2"}
    state = status.run_status(run_index.FoundRun(paths, run.read_job()))
    assert (state.job_id, state.is_live) == (new_id, True)

    assert sleeping.resubmit() == new_id, "a second call finds the job"
    without_id = second.model_copy(update={"job_id": None})
    write_record(paths.job, run.read_job().model_copy(update={"attempts": [first, without_id]}))
    assert sleeping.resubmit() == new_id, "it finds the job by its token too"
    assert run.read_job().attempts == [first, second]
    assert len(live_jobs()) == 3


def test_run_status_while_a_run_is_being_resubmitted_is_that_of_its_first_job(
    sleeping: Sleeping,
) -> None:
    """The new attempt is recorded, and sbatch has not returned yet."""
    job = sleeping.run.read_job()
    first = job.attempts[0]
    second = first.model_copy(update={"job_id": None, "token": "hpcft-x", "array_index": None})
    job = job.model_copy(update={"attempts": [first, second]})
    found = run_index.FoundRun(sleeping.run.paths, job)
    state = status.run_status(found)
    assert (state.job_id, state.is_live) == (sleeping.job_id, True)
    slurm_commands.cancel(sleeping.job_id)
    until(lambda: not status.run_status(found).is_live, 20)


def two_supervisors(sleeping: Sleeping) -> list[Supervisor]:
    """The supervisors of a job with two ranks, whose workers have ended."""
    paths = sleeping.run.paths
    paths.errors.mkdir(exist_ok=True)
    error = RankError.now(0, "X", "no", node="n1", phase="training")
    write_record(paths.errors / "0.json", error)
    ranks = [RankInfo(rank, 2, rank, "n1", sleeping.job_id) for rank in range(2)]
    return [Supervisor(sleeping.run, rank) for rank in ranks]


def leave_all(supervisors: list[Supervisor], recovery: Recovery) -> list[int]:
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda one: one._leave(recovery), supervisors))


def test_supervisors_leave_after_one_of_them_has_resubmitted_the_run(
    sleeping: Sleeping, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = sleeping.run
    (recovery,) = run.read_recoveries()
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "/nowhere")
        assert leave_all(two_supervisors(sleeping), recovery) == [1, 1]
    assert run.read_recoveries() == [], "the recovery could not be carried out"
    assert run.read_plan() == sleeping.submitted
    (error,) = read_rank_errors(run.paths)
    assert (error.failure, error.message) == (
        "out_of_memory", "rank 0 on n1 ran out of memory (training): no; there is no fallback"
    )  # fmt: skip
    assert error.next_step.startswith(
        "set resources.nodes: 2 and submit the run again (hpcft could not resubmit it by itself: "
        "sbatch is not on"
    )
    write_record(run.paths.recoveries / "1.json", recovery)
    write_record(run.paths.current_plan, sleeping.wider)
    assert leave_all(two_supervisors(sleeping), recovery) == [0, 0]
    assert leave_all(two_supervisors(sleeping), recovery) == [0, 0], "after a restart by Slurm too"
    assert len(run.read_job().attempts) == 2
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
# More than each of two nodes needs, and less than one node alone.
LIMIT_MIB = 2_500
# Both runs sum the same numbers in fp32, in another order.
TOLERANCE = 1e-5


@pytest.mark.slow
def test_a_run_that_does_not_fit_on_one_node_completes_on_two(
    workplace: Path, cli: Cli, testbed: Any
) -> None:
    """Its profile claims too much memory; the same run without a limit stays on one node."""
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
    (recovery,) = read_recoveries(RunPaths(boasting))
    first, second = read_record(boasting / "job.json", Job).attempts
    assert (recovery.change, recovery.action) == ("1 → 2 nodes, resubmitted", "resubmit")
    assert recovery.job_id == first.job_id
    result = read_record(boasting / "result.json", RunRecord)
    assert (result.job_id, result.fallbacks) == (second.job_id, [recovery])
    assert metrics_lines(boasting)[0]["kind"] == "recovery", "the new job starts from step 0"
    assert not read_recoveries(RunPaths(honest))
    assert len(read_record(honest / "job.json", Job).attempts) == 1
    assert losses(boasting)[-2:] == pytest.approx(losses(honest), rel=TOLERANCE)
    (row,) = cli("collect", "deep", "--json").json
    assert (row["state"], row["rungs"]) == ("COMPLETED", ["1 → 2 nodes, resubmitted"])
    cli("calibrate")
    next_plan = cli("plan", "deep.yaml", "-c", "boasting.yaml", "--json").json
    assert next_plan["layout"]["nodes"] == 2
