"""Measures one case in real training by hpcft, in fresh processes, under a profiler.

    python benchmarks/memory/measure.py CASE [--timeline] [--device cpu|cuda] [--json FILE]

On a CPU the measurement adds up what the allocator reports to `torch.profiler`: every block that is
allocated or freed, with its address and operation. The growth of the process's resident set is
reported too. On a GPU the measurement is what the caching allocator counts.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cases
from case import Case

from hpcft.config import cluster_profile
from hpcft.core.paths import RunPaths
from hpcft.core.records import Calibration, Cluster, OomCaps, Plan
from hpcft.planning import model_facts
from hpcft.planning.inputs import PlanInputs
from hpcft.planning.memory.step_memory import step_memory
from hpcft.planning.memory.trace_types import StepMemory, TracedStep
from hpcft.planning.planner import make_plan

TIMEOUT_S = 900
UNLIMITED_GIB = 1e6
MAX_GROUPS = 10  # Groups of live blocks that are kept without --timeline.


def plan_of(case: Case, device: str = "cpu") -> Plan:
    """Returns the plan of a case on this machine, as if its memory were unlimited.

    The measured examples all have the full length, so that no attention mask is needed; the plan
    assumes the same.
    """
    recipe = case.recipe()
    facts = model_facts.compute_model_facts(recipe.model, recipe.task, recipe.method)

    def trace(step: TracedStep) -> StepMemory:
        measured = {"labelled_tokens": case.labelled_tokens, "threads": case.threads}
        return step_memory(step.model_copy(update={"padded": False, **measured}))

    facts = facts.model_copy(update={"supports_chunked_loss": case.loss_chunks > 1})
    return make_plan(PlanInputs(recipe, _cluster(case, device), facts, trace=trace))


def _cluster(case: Case, device: str) -> Cluster:
    """Returns this machine, with a calibration that sets the case's number of loss chunks."""
    cluster = cluster_profile.load_profile("local").cluster
    caps = OomCaps(
        per_device_train_batch_size=case.batch,
        gradient_checkpointing=case.checkpointing,
        loss_chunks=case.loss_chunks,
    )
    changes: dict[str, Any] = {
        "host_memory_gib": UNLIMITED_GIB, "calibration": Calibration(oom_caps={case.name: caps})
    }  # fmt: skip
    if device == "cpu":
        changes |= {"accelerator": "cpu", "gpus_per_node": 0, "gpu": None}
    elif cluster.gpu is not None:
        changes["gpu"] = cluster.gpu.model_copy(update={"memory_gib": UNLIMITED_GIB})
    return cluster.model_copy(update=changes)


def measure(case: Case, device: str = "cpu", *, timeline: bool = False) -> dict[str, Any]:
    """Measures a case.

    Returns:
        The measurement of the rank with the highest peak, with those of all ranks as `ranks`.

    Raises:
        RuntimeError: a rank failed; the message has the end of its stderr.
    """
    with tempfile.TemporaryDirectory(prefix="hpcft-measure-") as name:
        folder = Path(name)
        plan = plan_of(case, device)
        (folder / "plan.json").write_text(plan.model_dump_json())
        _write_weights(case, RunPaths(folder))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ranks = [_start(case, folder, rank, port) for rank in range(case.ranks)]
        _wait(ranks)
        # Ranks that failed by themselves come first; the others were killed because of them.
        failed = sorted(
            (rank for rank, process in enumerate(ranks) if process.returncode),
            key=lambda rank: ranks[rank].returncode < 0,
        )
        if failed:
            stderr = (folder / f"{failed[0]}.err").read_text()[-1500:]
            code = ranks[failed[0]].returncode
            raise RuntimeError(f"{case.name}: rank {failed[0]} exited with code {code}: {stderr}")
        results = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(case.ranks)]
    if device == "cpu" and not timeline:
        for result in results:
            del result["operations"], result["groups"][MAX_GROUPS:]
    largest = max(results, key=lambda result: result["peak_bytes"])
    return {"name": case.name, "digest": case.digest, **largest, "ranks": results}


def _wait(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Waits for all ranks; kills the others when one has failed, since they would wait for it."""
    deadline = time.monotonic() + TIMEOUT_S
    while any(process.poll() is None for process in ranks):
        if any(process.poll() for process in ranks) or time.monotonic() > deadline:
            for process in ranks:
                process.kill()
        time.sleep(0.05)
    if time.monotonic() > deadline:
        raise RuntimeError(f"the ranks had not finished after {TIMEOUT_S} s and were killed")


def _start(case: Case, folder: Path, rank: int, port: int) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(case.threads),
    }
    command = [
        sys.executable,
        str(Path(__file__).with_name("rank.py")),
        case.name,
        str(folder),
        str(rank),
    ]
    with (folder / f"{rank}.err").open("wb") as errors:
        return subprocess.Popen(command, env=environment, stdout=errors, stderr=errors)


def _write_weights(case: Case, paths: RunPaths) -> None:
    """Writes random weights and a tokenizer into the run folder, as rank 0 of a run does."""
    from hpcft.core.records import TokenizerTraining
    from hpcft.training.data import prepare
    from hpcft.training.data.tokenizer import train_tokenizer

    recipe = case.recipe()
    tokenizer = train_tokenizer(
        TokenizerTraining(vocab_size=260), ["a text"], causal=recipe.task.causal
    )
    tokenizer.save_pretrained(paths.prepared / "tokenizer")
    prepare.write_initial_weights(recipe, tokenizer, paths.prepared / "model")


def main() -> None:
    """Measures the named case and prints its peaks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("case", help="name of the case")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--timeline", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    case = cases.find_case(options.case)
    measured = measure(case, options.device, timeline=options.timeline)
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1))
    for rank, result in enumerate(measured["ranks"]):
        print(f"rank {rank}: {describe(result)}")
        if options.timeline and rank == 0:
            for group in result["groups"]:
                blocks = f"{group['count']:>4} × {group['size']:>12,}  {group['made_in']}"
                print(f"  {group['bytes']:>14,} = {blocks}")
            print(*(f"  {line}" for line in result["operations"]), sep="\n")


def describe(result: dict[str, Any]) -> str:
    """Returns the memory of a rank in MiB, in one line."""
    if "reserved_bytes" in result:
        figures = {
            "allocated": result["peak_bytes"],
            "reserved": result["reserved_bytes"],
            "device": result["device_bytes"],
        }
    else:
        figures = {
            "peak": result["peak_bytes"],
            **{f"step {n}": peak for n, peak in enumerate(result["step_peaks_bytes"], 1)},
            "before": result["before_bytes"],
            "setup": result["setup_peak_bytes"],
            "loading": result["loading_peak_bytes"],
        }
    figures |= {"RSS": result["rss_bytes"], "RSS before": result["rss_before_bytes"]}
    sizes = ", ".join(f"{name} {size / 2**20:.2f}" for name, size in figures.items())
    return f"{sizes} MiB; {result['step_s'][-1]:.2f} s a step"


if __name__ == "__main__":
    main()
