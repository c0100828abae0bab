"""Real runs as a test sees them: their folders, what they have logged, and their processes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil


def until(true: Callable[[], object], seconds: float = 120.0, what: str = "it") -> None:
    """Waits until something is true, and fails where it is not in time."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.1)


# ---------------------------------------------------------------- folders


def folder_of(name: str) -> Path:
    """The run folder of a recipe's only run."""
    (folder,) = Path("runs", name).absolute().glob("*")
    return folder


def step(folder: Path) -> int:
    """The optimizer step, or the example, that a run has reached; 0 before its first."""
    file = folder / "progress.json"
    return int(json.loads(file.read_text())["step"]) if file.exists() else 0


def lines(folder: Path) -> list[dict[str, Any]]:
    """What a run has logged: steps, evaluations, recoveries."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    """The losses that a run has logged, in order."""
    return [line["loss"] for line in lines(folder) if "loss" in line]


# ---------------------------------------------------------------- processes


def executing(module: str, folder: Path) -> list[psutil.Process]:
    """Processes that execute a module for this folder."""
    return [p for p in psutil.process_iter(["cmdline", "environ"])
            if {module, str(folder)} <= set(p.info["cmdline"] or ())
            and not p.info["cmdline"][0].endswith("srun")]  # fmt: skip


def children(folder: Path) -> list[int]:
    """The training processes of a run."""
    return [process.pid for process in executing("hpcft.training.worker", folder)]


def supervisors(folder: Path) -> dict[int, int]:
    """The process that watches over each rank of a run's latest job, by rank."""
    attempt = json.loads((folder / "job.json").read_text())["attempts"][-1]
    found = {}
    for process in executing("submitit.core._submit", Path(attempt["logs"])):
        told = process.info["environ"] or {}
        element = told.get("SLURM_ARRAY_TASK_ID")  # elements of an array share their logs
        if attempt["array_index"] is None or element == str(attempt["array_index"]):
            found[int(told.get("SUBMITIT_LOCAL_GLOBALID") or told["SLURM_PROCID"])] = process.pid
    return found


def gone(folder: Path) -> bool:
    """Whether no process of a run is alive."""
    controllers = executing("hpcft.scheduler.local_controller", folder / "logs")
    return not (children(folder) or supervisors(folder) or controllers)
