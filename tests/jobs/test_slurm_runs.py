"""Runs on a real Slurm cluster, submitted, watched and collected with the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from builders import RECIPE, Cli, film_rows, write_rows
from real_runs import current_step, folder_of, losses, supervisor_pids, until

pytestmark = pytest.mark.slurm

STEPS = 6
# Largest difference between the losses of one rank and of four at the same global batch. They sum
# in another order in fp32 (padding, micro-batches, reduction), which changes the loss of a step by
# about 1e-6. Adam multiplies that: its update has the size of the learning rate even if a gradient
# is only rounding. At a rate of 1e-4 and six steps the difference stays below this.
TOLERANCE = 2e-5

QLORA = """\
name: qlora
model:
  config: { model_type: llama, vocab_size: 400, hidden_size: 32, intermediate_size: 64,
            num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1,
            max_position_embeddings: 64 }
  tokenizer: { vocab_size: 400 }
task:
  name: instruction
  data: { files: { train: train.jsonl, test: test.jsonl } }
  prompt: "{text} is"
  completion: " {label}"
  choices: [" good", " bad"]
  max_length: 48
method: { name: qlora, r: 4, target_modules: all-linear }
train: { global_batch_size: 4, max_steps: 3, learning_rate: 1e-3, optim: paged_adamw_8bit }
resources: { gpus_per_node: 2, time_min: 10 }
baseline: { source: made up, metrics: { accuracy: 0.5 } }
"""


def hpcft(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command as a user does, in a process of its own."""
    command = [sys.executable, "-m", "hpcft", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)


@pytest.fixture(scope="module")
def campus(testbed: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder on the cluster, with three recipes submitted, watched and completed."""
    folder = tmp_path_factory.mktemp("campus")
    rows = film_rows(12)
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "test.jsonl", rows[:8])
    still = "    hidden_dropout_prob: 0.0\n    attention_probs_dropout_prob: 0.0\n"
    (folder / "tiny.yaml").write_text(RECIPE.replace("    vocab_size", f"{still}    vocab_size", 1))
    (folder / "qlora.yaml").write_text(QLORA)
    before = Path.cwd()
    os.chdir(folder)
    common = ["-o", f"train.max_steps={STEPS}", "-o", "train.learning_rate=1e-4",
              "-o", "train.logging_steps=1"]  # fmt: skip
    submissions = {
        "four": ["tiny.yaml", *common, "-o", "name=four", "-o", "resources.nodes=2",
                 "-o", "resources.gpus_per_node=2", "-o", "resources.zero_stage=3"],
        "one": ["tiny.yaml", *common, "-o", "name=one"],
        "accumulated": ["tiny.yaml", *common, "-o", "name=accumulated",
                        "-o", "train.per_device_train_batch_size=1"],
        "qlora": ["qlora.yaml"],
        "sweep": ["tiny.yaml", "-o", "name=sweep",
                  "-o", "sweep.grid={train.learning_rate: [1e-3, 1e-4]}",
                  "-o", "sweep.seeds=[1, 2, 3]"],
    }  # fmt: skip
    try:
        for arguments in submissions.values():
            done = hpcft("submit", *arguments)
            assert done.returncode == 0, done.stderr
        watched = hpcft("status", "--watch")
        assert watched.returncode == 0, watched.stderr
        yield folder
    finally:
        os.chdir(before)


def test_submit_of_zero3_on_two_nodes_starts_two_ranks_on_each(campus: Path) -> None:
    (folder,) = campus.glob("runs/four/*")
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["ds_config"]["zero_optimization"]["stage"] == 3
    (job,) = json.loads((folder / "job.json").read_text())["attempts"]
    for rank in range(4):
        log = (folder / "logs" / f"{job['job_id']}_{rank}_log.out").read_text()
        assert f"global_rank={rank}(4)" in log
        assert f"node={rank // 2}(2)" in log


@pytest.mark.parametrize("other", ["four", "accumulated"])
def test_losses_at_the_same_global_batch_agree(campus: Path, other: str) -> None:
    ours, theirs = losses(folder_of("one")), losses(folder_of(other))
    assert len(ours) == STEPS
    assert ours == pytest.approx(theirs, abs=TOLERANCE)
    assert ours[0] != ours[-1]


def test_submit_of_a_sweep_is_one_job_array(campus: Path) -> None:
    jobs = [json.loads(file.read_text()) for file in campus.glob("runs/sweep/*/job.json")]
    ids = [job["attempts"][0]["job_id"] for job in jobs]
    assert len({job_id.split("_")[0] for job_id in ids}) == 1
    assert sorted(int(job_id.split("_")[1]) for job_id in ids) == list(range(6))


def test_collect_of_all_recipes_is_one_table(campus: Path) -> None:
    rows = json.loads(hpcft("collect", "--json").stdout)
    assert {row["state"] for row in rows} == {"COMPLETED"}
    sweep = [row for row in rows if row["recipe"] == "sweep"]
    assert [len(row["run_ids"]) for row in sweep] == [3, 3]
    assert all(row["metrics"]["accuracy"]["stdev"] is not None for row in sweep)
    table = hpcft("collect", "--format", "md").stdout
    assert "(n=3)" in table
    (line,) = [line for line in table.splitlines() if "| qlora |" in line]
    assert "0.5000" in line, "the reported number is in the same row"
    assert "made up" in line


def test_submit_of_the_same_recipe_finds_its_run(campus: Path) -> None:
    before = subprocess.run(["squeue", "-h", "-t", "all", "-r"], capture_output=True, text=True)
    said = hpcft("submit", "qlora.yaml")
    assert said.returncode == 0
    assert "has completed already" in said.stderr
    after = subprocess.run(["squeue", "-h", "-t", "all", "-r"], capture_output=True, text=True)
    assert after.stdout.count("\n") == before.stdout.count("\n")


def test_dry_run_shows_the_script_that_is_submitted(campus: Path) -> None:
    shown = json.loads(
        hpcft("submit", "qlora.yaml", "-o", "name=dry", "--dry-run", "--json").stdout
    )
    assert not (campus / "runs/dry").exists()
    assert hpcft("submit", "qlora.yaml", "-o", "name=dry").returncode == 0
    (script,) = campus.glob("runs/dry/*/logs/*_submission.sh")
    assert script.read_text().strip() == shown["jobs"][0]["sbatch_script"].strip()
    assert hpcft("cancel", "dry").returncode == 0


def test_status_without_accounting_is_right(campus: Path, testbed: Any) -> None:
    """Recent jobs are still in squeue."""
    testbed.stop_accounting()
    try:
        said = hpcft("status", "--json")
        assert said.returncode == 0
        states = {view["recipe"]: view["state"] for view in json.loads(said.stdout)}
        states.pop("dry", None)  # Another test has just cancelled it.
        assert set(states.values()) == {"COMPLETED"}
    finally:
        testbed.start_accounting()


def _status(cli: Cli, name: str) -> Any:
    """Returns the status of a recipe's only run."""
    return cli("status", name, "--json").json[0]


def test_a_dead_rank_ends_all_ranks_and_the_job_is_requeued(campus: Path, cli: Cli) -> None:
    said = hpcft("submit", "tiny.yaml", "-o", "name=dead", "-o", "train.max_steps=100000",
                 "-o", "resources.nodes=2")  # fmt: skip
    assert said.returncode == 0, said.stderr
    until(lambda: current_step(folder_of("dead")) > 0)
    os.kill(supervisor_pids(folder_of("dead"))[1], signal.SIGKILL)
    until(lambda: _status(cli, "dead")["recoveries"], 60)
    (recovery,) = _status(cli, "dead")["recoveries"]
    cli("cancel", "dead")
    # Either is recorded first: that the rank died, or that srun then ended the other one.
    assert recovery["cause"] in ("rank_died", "preempted")
    assert recovery["action"] == "requeue"
    until(lambda: _status(cli, "dead")["state"] == "CANCELLED", 30)


def test_status_explains_why_a_job_waits(campus: Path, cli: Cli, testbed: Any) -> None:
    for node in ("n1", "n2", "n3", "n4"):
        testbed.set_node(node, "drain", "test")
    try:
        assert hpcft("submit", "tiny.yaml", "-o", "name=waits").returncode == 0
        until(lambda: "nodes" in _status(cli, "waits")["note"], 30)
        assert _status(cli, "waits")["state"] == "PENDING"
        assert "cancelled" in cli("cancel", "waits").err
        until(lambda: _status(cli, "waits")["state"] == "CANCELLED", 30)
    finally:
        for node in ("n1", "n2", "n3", "n4"):
            testbed.set_node(node, "resume", "")
