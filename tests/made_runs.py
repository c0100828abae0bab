"""Run folders made up here, and the scheduler that answers for their jobs."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hpcft.config.recipe_types import FullRecipe
from hpcft.core import run_index
from hpcft.core.errors import ClusterError
from hpcft.core.files import create_folder, write_record
from hpcft.core.paths import RunPaths
from hpcft.core.records import (
    Attempt,
    Job,
    Layout,
    Measurement,
    MemoryItem,
    ModelFacts,
    ParameterCount,
    Plan,
    Progress,
    Recovery,
    RunRecord,
)
from hpcft.jobs import results, status
from hpcft.recovery import diagnosis
from hpcft.scheduler import slurm
from hpcft.scheduler.job_state import JobState

AWAY = ClusterError("squeue failed (1): Unable to contact slurm controller")
GIB = 2**30
# What PyTorch says when a GPU is full, and of whom.
OOM = ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.25 GiB. GPU 0 has a total "
       "capacity of 14.74 GiB of which 1.12 GiB is free. {who}Of the allocated memory 13.01 GiB is "
       "allocated by PyTorch, and 402.51 MiB is reserved by PyTorch but unallocated.")  # fmt: skip
MINE = "Including non-PyTorch memory, this process has 13.61 GiB memory in use. "


def recipe(seed: int = 1, learning_rate: float = 1e-4, **sections: Any) -> FullRecipe:
    """The recipe of a run."""
    made: dict[str, Any] = {
        "name": "made", "model": {"path": "x/y"}, "method": {"name": "full"},
        "task": {"name": "classification", "labels": ["a", "b"], "data": {"path": "x/y"}},
        "train": {"seed": seed, "learning_rate": learning_rate}, **sections,
    }  # fmt: skip
    return FullRecipe.model_validate(made)


def record(run_id: str, **metrics: float) -> RunRecord:
    """What came out of a run."""
    return RunRecord(
        run_id=run_id, recipe="made", finished_at=1.0, split="test", metrics=metrics,
        parameters=ParameterCount(total=66_364_418, trainable=592_130, added=0, largest_layer=0),
        measured=Measurement(wall_s=3600.0, gpu_hours=2.0, peak_memory_bytes=3 * GIB,
                          peak_host_bytes=GIB),
        predicted_memory_bytes=4 * GIB,
    )  # fmt: skip


def plan() -> Plan:
    """A plan of round numbers."""
    laid = Layout(nodes=1, ranks_per_node=1, per_device_train_batch_size=1,
                  gradient_accumulation_steps=1, gradient_checkpointing=False, zero_stage=0,
                  offload_optimizer="none", offload_param="none")  # fmt: skip
    facts = ModelFacts(
        model_type="bert", layers=1, hidden_size=1, vocab_size=1, logits_width=1,
        parameters=ParameterCount(total=8_537_680_896, trainable=8_537_680_896, added=0,
                                  largest_layer=0),
    )  # fmt: skip
    return Plan(recipe="made", cluster="site", accelerator="cuda", layout=laid, precision="bf16",
                optim="adamw_torch", per_device_eval_batch_size=1, facts=facts,
                gpu_memory=[MemoryItem(name="all", bytes=70 * GIB, rule="")],
                gpu_capacity_bytes=80 * GIB, host_memory=[], host_capacity_bytes=1,
                cpus_per_task=1, mem_mib=1, time_min=1)  # fmt: skip


def met(paths: RunPaths, step: int, at: float = 1.0, **fields: Any) -> None:
    """Writes into a run folder that the run has met something, and went on from a step."""
    known: dict[str, Any] = {"number": 1, "job_id": "11", "rank": 1, "node": "n2", "cause": "nccl",
                             "evidence": "peer gone", "action": "requeue"}  # fmt: skip
    paths.recoveries.mkdir()
    made = Recovery(at=at, step=step, layout=plan().layout, per_device_eval_batch_size=1,
                    **(known | fields))  # fmt: skip
    write_record(paths.recoveries / "1.json", made)


def progress(age_s: float = 0.0, **fields: Any) -> Progress:
    """A heartbeat, so many seconds old."""
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
        create_folder(paths.folder)
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
        write_record(paths.job, Job(**(known | fields)))
        files = {RunRecord: paths.result, Progress: paths.progress, Plan: paths.plan,
                 FullRecipe: paths.recipe}  # fmt: skip
        for part in parts:
            write_record(files[type(part)], part)
            if isinstance(part, Progress):
                os.utime(paths.progress, (part.updated_at, part.updated_at))
        for rank, (kind, message) in enumerate(errors):
            paths.errors.mkdir(exist_ok=True)
            said = diagnosis.RankError(rank=rank, node=f"n{rank}", at=10.0 + rank, kind=kind,
                                      message=message)  # fmt: skip
            write_record(paths.errors / f"{rank}.json", said)
        if log:
            (paths.logs / f"{job_id}_0_log.err").write_text(log)
        return paths

    def view(self, run_id: str) -> status.RunStatus:
        """What is known of a run."""
        ((paths, job),) = run_index.find_runs(self.root, run_id)
        return status.run_status(paths, job)

    def rows(self) -> list[results.ResultRow]:
        """The table of all runs."""
        return results.result_rows(status.run_statuses(run_index.list_runs(self.root)))


def made_in(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """No runs yet, in a folder; from now on they are asked for the states of jobs."""
    made = Runs(workplace / "runs")
    (made.root / "made").mkdir(parents=True)

    def states(job_ids: list[str]) -> dict[str, JobState]:
        made.asked += job_ids
        unknown = JobState("UNKNOWN", str(made.away) if made.away else "nobody knows the job")
        known = {} if made.away else made.states
        return {job_id: known.get(job_id, unknown) for job_id in job_ids}

    def by_token() -> dict[tuple[str, int | None], str]:
        made.asked.append("tokens")
        if made.away:
            raise made.away
        return {(token, None): job_id for token, job_id in made.tokens.items()}

    monkeypatch.setattr(slurm, "job_states", states)
    monkeypatch.setattr(slurm, "ids_by_token", by_token)
    return made
