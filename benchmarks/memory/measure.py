"""Measures one case for real: the product's own training, in fresh processes, under a profiler.

    python benchmarks/memory/measure.py CASE [--timeline] [--device cpu|cuda] [--json FILE]

The truth on a CPU is what the allocator itself reports to `torch.profiler`: each block that is
taken or given back, with its address and the operation that did it. The resident set of the process
is reported beside. On a GPU it is what the caching allocator counts.
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
from cases import Case

from hpcft import ds_config
from hpcft.cluster import profile
from hpcft.layouts import precision_of
from hpcft.memory import parameters
from hpcft.paths import RunPaths
from hpcft.records import Cluster, Layout, Plan

TIMEOUT_S = 900
MOST_GROUPS = 10  # kept of what lived at the peak, unless the whole timeline is asked for


def cluster_of(device: str) -> Cluster:
    """This machine, with or without its GPU."""
    cluster = profile.load("local").cluster
    if device == "cpu":
        return cluster.model_copy(update={"accelerator": "cpu", "gpus_per_node": 0, "gpu": None})
    return cluster


def plan_of(case: Case, device: str = "cpu") -> Plan:
    """The plan of a case on this machine: its one layout, whatever memory that takes."""
    recipe = case.recipe()
    cluster = cluster_of(device)
    facts = parameters.facts(recipe.model, recipe.task, recipe.method)
    precision = precision_of(recipe, cluster)
    layout = Layout(
        nodes=1,
        ranks_per_node=case.ranks,
        per_device_train_batch_size=case.batch,
        gradient_accumulation_steps=case.accumulation,
        gradient_checkpointing=case.checkpointing,
        zero_stage=case.stage,
        offload_optimizer="none",
        offload_param="none",
        loss_chunks=case.loss_chunks,
    )
    return Plan(
        recipe=recipe.name,
        cluster=cluster.name,
        accelerator=cluster.accelerator,
        layout=layout,
        precision=precision,
        optim=case.optim,
        per_device_eval_batch_size=case.batch,
        facts=facts,
        gpu_memory=[],
        gpu_capacity_bytes=0,
        host_memory=[],
        host_capacity_bytes=0,
        cpus_per_task=1,
        mem_mib=0,
        time_min=0,
        ds_config=ds_config.build(layout, precision, facts, recipe.train, cluster),
    )


def measure(case: Case, device: str = "cpu", *, timeline: bool = False) -> dict[str, Any]:
    """What every rank of a case needed, and the most that one of them did.

    Raises:
        RuntimeError: a rank failed; with the end of what it said.
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
        # Those that ended by themselves come first: the others were only ended after them.
        failed = sorted(
            (rank for rank, process in enumerate(ranks) if process.returncode),
            key=lambda rank: ranks[rank].returncode < 0,
        )
        if failed:
            said = (folder / f"{failed[0]}.err").read_text()[-1500:]
            code = ranks[failed[0]].returncode
            raise RuntimeError(f"{case.name}: rank {failed[0]} ended with {code}: {said}")
        found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(case.ranks)]
    if device == "cpu" and not timeline:
        for rank in found:
            del rank["operations"], rank["groups"][MOST_GROUPS:]
    most = max(found, key=lambda rank: rank["peak_bytes"])
    return {"name": case.name, "digest": case.digest, **most, "ranks": found}


def _wait(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Waits for all ranks; when one has failed, the others, which would wait for it, are ended."""
    deadline = time.monotonic() + TIMEOUT_S
    while any(process.poll() is None for process in ranks):
        if any(process.poll() for process in ranks) or time.monotonic() > deadline:
            for process in ranks:
                process.kill()
        time.sleep(0.05)
    if time.monotonic() > deadline:
        raise RuntimeError(f"not done after {TIMEOUT_S} s")


def _start(case: Case, folder: Path, rank: int, port: int) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "2" if case.ranks == 1 else "1",
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
    """Random weights and a tokenizer, on files, as rank 0 of a run makes them."""
    from hpcft.records import TokenizerTraining
    from hpcft.train import prepare
    from hpcft.train.tokenizer import train_tokenizer

    recipe = case.recipe()
    wanted = TokenizerTraining(vocab_size=260)
    tokenizer = train_tokenizer(wanted, ["a text"], causal=recipe.task.causal)
    tokenizer.save_pretrained(paths.prepared / "tokenizer")
    prepare._new_weights(recipe, tokenizer, paths.prepared / "model")


def main() -> None:
    """Measures the named case and prints what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("case", help="its name")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--timeline", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    case = cases.named(options.case)
    found = measure(case, options.device, timeline=options.timeline)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    for rank, result in enumerate(found["ranks"]):
        print(f"rank {rank}: {describe(result)}")
        if options.timeline and rank == 0:
            for group in result["groups"]:
                what = f"{group['count']:>4} × {group['size']:>12,}  {group['made_in']}"
                print(f"  {group['bytes']:>14,} = {what}")
            print(*(f"  {line}" for line in result["operations"]), sep="\n")


def describe(result: dict[str, Any]) -> str:
    """One line of what a rank needed, in MiB."""
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
