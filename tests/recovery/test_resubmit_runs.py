"""More nodes on a real Slurm: a run is queued anew once, and ends on two nodes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from builders import ROOT, Cli, film_rows, layout, write_rows
from hpcft.config.recipe_types import FullRecipe
from hpcft.core import files, run_index
from hpcft.core.errors import ClusterError
from hpcft.core.paths import RunPaths
from hpcft.core.records import Cluster, Job, Plan, Recovery, RunRecord
from hpcft.jobs import status
from hpcft.planning import oom_fallback
from hpcft.recovery import log, replan, resubmit
from hpcft.recovery.diagnosis import RankError, read_rank_errors
from hpcft.scheduler import slurm
from hpcft.training.distributed.rank_env import RankInfo
from hpcft.training.supervision.supervisor import Supervisor
from real_runs import lines, losses, until

pytestmark = pytest.mark.slurm

# ---------------------------------------------------------------- queued once, on a real Slurm


class Queued(NamedTuple):
    """A run whose job sleeps, at the end of its ladder."""

    paths: RunPaths
    plan: Plan
    wider: Plan
    cluster: Cluster
    job_id: str

    def job(self) -> Job:
        return files.read_record(self.paths.job, Job)

    def queue(self, **changes: Any) -> str:
        cluster = self.cluster.model_copy(update=changes)
        return resubmit.resubmit(self.paths, self.wider, cluster, self.job_id)


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
    (_, _), (paths, job) = run_index.list_runs(Path("runs").absolute())
    (attempt,) = job.attempts
    assert attempt.job_id is not None
    plan, cluster = files.read_record(paths.plan, Plan), files.read_record(paths.cluster, Cluster)
    made = files.read_record(paths.recipe, FullRecipe)
    lowest = layout(0, gradient_accumulation_steps=4, gradient_checkpointing=True)
    bottom = oom_fallback.with_layout(plan, lowest, 1, made, cluster)
    wider = replan.plan_on_more_nodes(bottom, made, cluster)
    assert wider is not None
    run = Queued(paths, plan, wider, cluster, attempt.job_id)
    who = RankError(rank=0, node="n1", at=1.0, kind="X", message="no", job_id=run.job_id)
    log.append_recovery(paths, plan, wider, number=1, action="resubmit", who=who)
    yield run
    for job_id in live_jobs():
        slurm.cancel(job_id)


def test_a_run_is_queued_anew_once(queued: Queued, monkeypatch: pytest.MonkeyPatch) -> None:
    # As within a job, of which the new one may inherit nothing.
    monkeypatch.setenv("SLURM_CPU_BIND", "quiet,mask_cpu:0x1")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    array, _, index = queued.job_id.partition("_")
    assert index == "1"
    paths, before = queued.paths, queued.job()
    files.write_json(paths.progress, {"phase": "training", "updated_at": 1, "started_at": 1})
    with pytest.raises(slurm.Refused, match=r"[Aa]ccount"):
        queued.queue(account="nobody")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "/nowhere")
        with pytest.raises(ClusterError, match="sbatch is not on PATH"):
            queued.queue()
    assert queued.job() == before
    assert files.read_record(paths.plan, Plan) == queued.plan

    new = queued.queue()
    assert "_" not in new, "of an array only this element, singly"
    assert os.environ["SLURM_NTASKS"] == "1"
    first, second = queued.job().attempts
    assert (first.job_id, second.job_id, second.array_index) == (queued.job_id, new, None)
    assert files.read_record(paths.plan, Plan) == queued.wider
    assert not paths.progress.exists()
    assert files.read_record(paths.previous / "0/plan.json", Plan) == queued.plan
    assert live_jobs() == {f"{array}_0": "1", f"{array}_1": "1", new: "2"}
    view = status.run_status(paths, queued.job())
    assert (view.job_id, view.is_live) == (new, True)

    assert queued.queue() == new, "asked again, it is found"
    noted = second.model_copy(update={"job_id": None})
    files.write_record(paths.job, queued.job().model_copy(update={"attempts": [first, noted]}))
    assert queued.queue() == new, "by its token too, had its id not been noted"
    assert queued.job().attempts == [first, second]
    assert len(live_jobs()) == 3


def test_between_its_two_jobs_a_run_has_not_failed(queued: Queued) -> None:
    """The token is noted, sbatch has not answered yet, and the first job waits for that."""
    first = queued.job().attempts[0]
    coming = first.model_copy(update={"job_id": None, "token": "hpcft-x", "array_index": None})
    job = queued.job().model_copy(update={"attempts": [first, coming]})
    view = status.run_status(queued.paths, job)
    assert (view.job_id, view.is_live) == (queued.job_id, True)
    slurm.cancel(queued.job_id)
    until(lambda: not status.run_status(queued.paths, job).is_live, 20)


def two_ranks(run: Queued) -> list[Supervisor]:
    """The supervisors of a job's ranks, when their children have ended."""
    run.paths.errors.mkdir(exist_ok=True)
    error = RankError(rank=0, node="n1", at=1.0, kind="X", message="no", phase="training")
    files.write_record(run.paths.errors / "0.json", error)
    ranks = [RankInfo(rank, 2, rank, "n1", run.job_id) for rank in range(2)]
    return [Supervisor(run.paths, me) for me in ranks]


def end_of(supervisors: list[Supervisor], rung: Recovery) -> list[int]:
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda one: one._leave(rung), supervisors))


def test_one_rank_queues_it_and_all_end(queued: Queued, monkeypatch: pytest.MonkeyPatch) -> None:
    (rung,) = log.read_recoveries(queued.paths)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "/nowhere")
        assert end_of(two_ranks(queued), rung) == [1, 1]
    assert log.read_recoveries(queued.paths) == [], "it was not taken after all"
    (error,) = read_rank_errors(queued.paths)
    assert (error.failure, error.message) == (
        "out_of_memory", "rank 0 on n1 was out of memory (training): no; there is no lower rung"
    )  # fmt: skip
    assert error.next_step.startswith(
        "set resources.nodes: 2 and submit it again (it could not do so itself: sbatch is not on"
    )
    files.write_record(queued.paths.recoveries / "1.json", rung)
    files.write_record(queued.paths.current_plan, queued.wider)
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


@pytest.mark.slow
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
    (step,) = log.read_recoveries(RunPaths(boasting))
    first, second = files.read_record(boasting / "job.json", Job).attempts
    assert (step.change, step.action) == ("1 → 2 nodes, resubmitted", "resubmit")
    assert step.job_id == first.job_id
    result = files.read_record(boasting / "result.json", RunRecord)
    assert (result.job_id, result.fallbacks) == (second.job_id, [step])
    assert lines(boasting)[0]["kind"] == "recovery", "what follows began anew"
    assert not log.read_recoveries(RunPaths(honest))
    assert len(files.read_record(honest / "job.json", Job).attempts) == 1
    assert losses(boasting)[-2:] == pytest.approx(losses(honest), rel=TOLERANCE)
    (row,) = cli("collect", "deep", "--json").json
    assert (row["state"], row["rungs"]) == ("COMPLETED", ["1 → 2 nodes, resubmitted"])
    cli("collect")
    next_plan = cli("plan", "deep.yaml", "-c", "boasting.yaml", "--json").json
    assert next_plan["layout"]["nodes"] == 2
