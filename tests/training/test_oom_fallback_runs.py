"""Tests of OOM fallbacks in real runs, whose memory is limited."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from builders import ROOT, Cli, write_rows
from hpcft.core import files
from hpcft.core.paths import RunPaths
from hpcft.core.records import RunRecord
from hpcft.core.units import MIB
from hpcft.recovery import log
from real_runs import current_step, folder_of, is_gone, losses, metrics_lines, until, worker_pids

pytestmark = pytest.mark.process

# ---------------------------------------------------------------- on this machine


# The logits take most memory: 128,000 words × 52 positions are 25 MiB an example, and a step holds
# them several times. A process takes about 0.7 GiB before its first step; so 16 examples do not
# fit, and 2 do.
LIMIT_BYTES = 1_400 * MIB
# Both runs sum the same numbers in fp32, in another order.
TOLERANCE = 1e-5

WIDE = """\
name: wide
model:
  config: { model_type: llama, vocab_size: 128000, hidden_size: 32, intermediate_size: 64,
            num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2,
            max_position_embeddings: 256, tie_word_embeddings: true }
  tokenizer: { vocab_size: 300 }
task:
  name: instruction
  data: { files: { train: train.jsonl, test: test.jsonl } }
  prompt: "{q}:"
  completion: " {a}"
  max_length: 192
method: { name: full }
train: { global_batch_size: 16, max_steps: 3, logging_steps: 1, learning_rate: 1e-4,
         train_sampling_strategy: sequential, eval_strategy: "no" }
evaluation: { per_device_eval_batch_size: 1 }
resources: { gpus_per_node: 1, time_min: 10 }
"""
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def example(first: int, words: int) -> dict[str, str]:
    """Makes an example whose answer has so many words."""
    answer = " ".join(WORDS[(first + i) % len(WORDS)] for i in range(words))
    return {"q": f"count {first}", "a": answer}


@pytest.fixture
def wide(workplace: Path) -> Path:
    """A recipe with long examples, whose micro-batch takes hundreds of MiB."""
    rows = [example(i, 40) for i in range(48)]
    write_rows(workplace / "train.jsonl", rows)
    write_rows(workplace / "test.jsonl", [example(i, 4) for i in range(4)])
    path = workplace / "wide.yaml"
    path.write_text(WIDE)
    return path


def run_limited(
    *arguments: object, limit_bytes: int = LIMIT_BYTES
) -> subprocess.CompletedProcess[str]:
    """Runs hpcft with a memory limit, which the processes that it starts inherit."""
    return subprocess.run(
        [sys.executable, "-m", "hpcft", *map(str, arguments)],
        capture_output=True, text=True, timeout=300, check=False,
        # Thread stacks count too, and machines have different numbers of cores.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes)),
    )  # fmt: skip


def test_out_of_memory_one_rank_retries_step_in_same_process(wide: Path, cli: Cli) -> None:
    """The losses are those of a run that was planned with a small enough micro-batch."""
    common = ["submit", wide, "-c", "local", "--watch", "-o"]
    too_large = run_limited(
        *common, "name=large", "-o", "train.per_device_train_batch_size=16",
        "-o", "evaluation.before=true", "-o", "evaluation.per_device_eval_batch_size=32",
    )  # fmt: skip
    assert too_large.returncode == 0, too_large.stderr
    honest = run_limited(*common, "name=honest", "-o", "train.per_device_train_batch_size=2")
    assert honest.returncode == 0, honest.stderr
    large = folder_of("large")
    recoveries = log.read_recoveries(RunPaths(large))
    changes = [recovery.change for recovery in recoveries]
    assert (
        next(change for change in changes if change.startswith("micro-batch"))
        == "micro-batch 16 → 8"
    )
    assert {recovery.action for recovery in recoveries} == {"retry_step"}
    assert all("allocate memory" in recovery.evidence for recovery in recoveries)
    assert [recovery.number for recovery in recoveries] == list(range(1, len(recoveries) + 1))
    assert not log.read_recoveries(RunPaths(folder_of("honest")))
    assert len(losses(large)) == 3
    assert losses(large) == pytest.approx(losses(folder_of("honest")), rel=TOLERANCE)
    result = files.read_record(large / "result.json", RunRecord)
    assert result.fallbacks == recoveries
    assert result.cluster == "local"
    rows = {row["recipe"]: row for row in cli("collect", "--json").json}
    assert rows["large"]["fallbacks"] == changes
    assert rows["honest"]["fallbacks"] == []
    assert cli("calibrate").code == 0
    next_plan = cli("plan", wide, "-c", "local", "-o", "name=large", "--json").json
    smallest = recoveries[-1].layout.per_device_train_batch_size
    assert next_plan["layout"]["per_device_train_batch_size"] <= smallest
    assert any("earlier runs of large ran out of memory" in why for why in next_plan["reasons"])
    assert "fell back to micro-batch 16 → 8" in cli("status", "large").out
    assert "Traceback" not in next((large / "logs").glob("*_0_log.err")).read_text()


def test_out_of_memory_zero3_all_ranks_restart_from_last_checkpoint(wide: Path, cli: Cli) -> None:
    """Only one of the two ranks has long examples, in the second step."""
    long = range(24, 32)
    rows = [example(i, 40 if i in long else 4) for i in range(48)]
    write_rows(wide.parent / "train.jsonl", rows)
    common = ["submit", wide, "-c", "local", "--watch", "-o", "resources.gpus_per_node=2",
              "-o", "resources.zero_stage=3", "-o", "train.packing=false", "-o"]  # fmt: skip
    too_large = run_limited(
        *common, "name=large", "-o", "train.per_device_train_batch_size=8",
        "-o", "train.save_strategy=steps", "-o", "train.save_steps=1",
        "-o", "evaluation.before=true",
    )  # fmt: skip
    assert too_large.returncode == 0, too_large.stderr
    honest = run_limited(*common, "name=honest", "-o", "train.per_device_train_batch_size=2",
                     "-o", "evaluation.before=true")  # fmt: skip
    assert honest.returncode == 0, honest.stderr
    large = folder_of("large")
    (recovery,) = log.read_recoveries(RunPaths(large))
    assert (recovery.change, recovery.action) == ("micro-batch 8 → 4", "restart")
    lines = [line for line in metrics_lines(large) if line["kind"] != "summary"]
    logged = [line["step"] if "loss" in line else line["kind"] for line in lines]
    assert [entry for entry in logged if entry != "step"] == ["before", 1, "recovery", 2, 3, "test"]
    assert losses(large) == pytest.approx(losses(folder_of("honest")), rel=TOLERANCE)
    results = [files.read_record(folder_of(name) / "result.json", RunRecord)
               for name in ("large", "honest")]  # fmt: skip
    assert results[0].metrics == pytest.approx(results[1].metrics, rel=TOLERANCE)
    assert results[0].metrics_before == pytest.approx(results[1].metrics_before, rel=TOLERANCE)
    assert not results[1].fallbacks
    job = json.loads((large / "job.json").read_text())
    assert len(job["attempts"]) == 1, "no other job was submitted"
    assert not (large / f"errors/{recovery.rank}.json").exists()


def test_out_of_memory_no_fallback_left_fails_and_lists_fallbacks(wide: Path, cli: Cli) -> None:
    """Not even one example fits: its logits take 260 MiB, and a step holds them several times."""
    rows = [example(i, 150) for i in range(8)]
    write_rows(wide.parent / "train.jsonl", rows)
    done = run_limited(
        "submit", wide, "-c", "local", "--watch", "-o", "train.per_device_train_batch_size=2",
        "-o", "train.gradient_checkpointing=true", "-o", "model.config.vocab_size=400000",
        "-o", "train.global_batch_size=2", limit_bytes=1_300 * MIB,
    )  # fmt: skip
    assert done.returncode == 1
    (view,) = cli("status", "--json").json
    assert view["state"] == "FAILED"
    changes = [recovery["change"] for recovery in view["recoveries"]]
    assert changes == ["micro-batch 2 → 1", "loss in 8 parts"]
    assert "ran out of memory (training): " in view["note"]
    assert "can't allocate memory" in view["note"]
    assert (
        f"no fallback is left after {', '.join(changes)}; take nodes with more memory"
        in view["note"]
    )


def test_killed_worker_without_evidence_restarts_without_fallback(tiny: Path, cli: Cli) -> None:
    submitted = cli("submit", tiny, "-c", "local", "-o", "train.max_steps=100000", "--json")
    folder = Path(submitted.json[0]["folder"])
    until(lambda: current_step(folder) > 0)
    (worker,) = worker_pids(folder)
    os.kill(worker, signal.SIGKILL)
    until(lambda: log.read_recoveries(RunPaths(folder)), 20.0)
    until(lambda: worker_pids(folder), 20.0)
    cli("cancel", "tiny")
    (recovery,) = cli("status", "--json").json[0]["recoveries"]
    assert (recovery["cause"], recovery["action"]) == ("rank_died", "restart")
    assert (recovery["change"], recovery["step"]) == ("", 0)
    assert recovery["evidence"] == "the training process was ended by SIGKILL"
    assert is_gone(folder)


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A cgroup with a memory limit; the test itself runs outside of it."""
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    group = (v1 if v1.is_dir() else v2) / f"hpcft-test-{os.getpid()}"
    limit = group / ("memory.limit_in_bytes" if v1.is_dir() else "memory.max")
    try:
        group.mkdir()
        limit.write_text(str(1_500 * MIB))
    except OSError as error:
        pytest.skip(f"this machine does not let us create a cgroup: {error.strerror}")
    yield group
    until(lambda: not (group / "cgroup.procs").read_text(), 20.0)
    group.rmdir()


@pytest.mark.slow
def test_worker_killed_by_kernel_for_memory_restarts_with_fallback(
    wide: Path, cli: Cli, memory_group: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", "hpcft", "submit", wide, "-c", "local",
               "-o", "train.per_device_train_batch_size=16"]  # fmt: skip
    procs = memory_group / "cgroup.procs"
    done = subprocess.run(
        ["sh", "-c", 'echo $$ > "$0"; exec "$@"', procs, *command],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    until(lambda: cli("status", "--json").json[0]["state"] in ("COMPLETED", "FAILED"))
    (view,) = cli("status", "--json").json
    assert view["state"] == "COMPLETED", view["note"]
    first = view["recoveries"][0]
    assert (first["change"], first["action"]) == ("micro-batch 16 → 8", "restart")
    assert "the kernel killed it for lack of memory" in first["evidence"]


# ---------------------------------------------------------------- on a real Slurm


@pytest.mark.slow
@pytest.mark.slurm
def test_out_of_memory_slurm_job_restarts_with_fallback_in_its_allocation(
    wide: Path, cli: Cli, testbed: Any
) -> None:
    """The profile of one run claims more memory than its two nodes have; the other is right."""
    limit_gib = 2.75
    shipped = (ROOT / "slurm/testbed.yaml").read_text()
    limits = f'setup: ["ulimit -S -d {int(limit_gib * 2**20)}"]\n'  # in KiB
    too_large = shipped.replace("name: testbed", "name: too_large") + limits
    honest = shipped.replace("name: testbed", "name: honest") + limits
    honest = honest.replace("host_memory_gib: 11.7", f"host_memory_gib: {limit_gib}")
    Path("too_large.yaml").write_text(too_large)
    Path("honest.yaml").write_text(honest)
    common = ["-o", "train.global_batch_size=64", "-o", "train.max_steps=2",
              "-o", "task.max_length=64", "-o", "resources.nodes=2",
              "-o", "resources.zero_stage=3"]  # fmt: skip
    write_rows(wide.parent / "train.jsonl", [example(i, 40) for i in range(128)])
    large = [*common, "-o", "train.per_device_train_batch_size=32"]
    for name, overrides in (("too_large", large), ("honest", common)):
        submitted = cli("submit", wide, "-c", f"{name}.yaml", "-o", f"name={name}", *overrides)
        assert submitted.code == 0, submitted.err
        done = cli("status", name, "--watch")
        assert done.code == 0, done.err
    recoveries = log.read_recoveries(RunPaths(folder_of("too_large")))
    assert recoveries[0].change == "micro-batch 32 → 16"
    assert {recovery.action for recovery in recoveries} == {"restart"}
    assert not log.read_recoveries(RunPaths(folder_of("honest")))
    job = json.loads((folder_of("too_large") / "job.json").read_text())
    (attempt,) = job["attempts"]
    jobs = subprocess.run(["squeue", "-h", "-t", "all", "-o", "%i %j"], capture_output=True,
                           text=True, check=True).stdout.split("\n")  # fmt: skip
    assert [line for line in jobs if line.endswith(" too_large")] == [
        f"{attempt['job_id']} too_large"
    ]
    ours, theirs = (losses(folder_of(name))[-2:] for name in ("too_large", "honest"))
    assert ours == pytest.approx(theirs, rel=TOLERANCE)
