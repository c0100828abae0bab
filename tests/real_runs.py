"""Helpers for tests of real runs: run folders, logged metrics, and processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import psutil

from hpcft.core.host import wait_until


def until(is_true: Callable[[], object], seconds: float = 120.0, what: str = "condition") -> None:
    """Waits until a condition is true; fails if it is not true in time."""
    in_time = wait_until(lambda: bool(is_true()), seconds, 0.1)
    assert in_time, f"{what}: not within {seconds:g} s"


# ---------------------------------------------------------------- folders


def folder_of(name: str) -> Path:
    """Returns the run folder of a recipe's only run."""
    (folder,) = Path("runs", name).absolute().glob("*")
    return folder


def current_step(folder: Path) -> int:
    """Returns the optimizer step, or the example, of a run; 0 before its first."""
    file = folder / "progress.json"
    return int(json.loads(file.read_text())["step"]) if file.exists() else 0


def metrics_lines(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl: steps, evaluations, recoveries."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    """Returns the logged losses of a run, in order."""
    return [line["loss"] for line in metrics_lines(folder) if "loss" in line]


# ---------------------------------------------------------------- processes


def find_processes(module: str, folder: Path) -> list[psutil.Process]:
    """Returns the processes that run a module with this folder as argument."""
    return [p for p in psutil.process_iter(["cmdline", "environ"])
            if {module, str(folder)} <= set(p.info["cmdline"] or ())
            and not p.info["cmdline"][0].endswith("srun")]  # fmt: skip


def worker_pids(folder: Path) -> list[int]:
    """Returns the process ids of a run's workers."""
    return [process.pid for process in find_processes("hpcft.training.worker", folder)]


def supervisor_pids(folder: Path) -> dict[int, int]:
    """Returns the process ids of the supervisors of a run's latest job, by rank."""
    attempt = json.loads((folder / "job.json").read_text())["attempts"][-1]
    pids = {}
    modules = ("hpcft.training.start_rank", "submitit.core._submit")  # The latter is of hpcft 0.1.
    for process in chain(*(find_processes(module, Path(attempt["logs"])) for module in modules)):
        environment = process.info["environ"] or {}
        element = environment.get("SLURM_ARRAY_TASK_ID")  # Elements of an array share their logs.
        if attempt["array_index"] is None or element == str(attempt["array_index"]):
            rank = environment.get("SUBMITIT_LOCAL_GLOBALID") or environment["SLURM_PROCID"]
            pids[int(rank)] = process.pid
    return pids


def is_gone(folder: Path) -> bool:
    """Returns whether no process of a run is alive."""
    controllers = find_processes("hpcft.scheduler.local_controller", folder / "logs")
    return not (worker_pids(folder) or supervisor_pids(folder) or controllers)
