"""Every file name of a run folder, and where the shipped recipes, profiles and templates are."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

DEFAULT_RUNS = Path("runs")


def shipped(kind: Literal["recipes", "ds_configs", "slurm"]) -> Path:
    """Folder of the files that travel with hpcft: inside the wheel, or in the checkout."""
    inside = Path(__file__).parents[1] / "shipped" / kind
    return inside if inside.is_dir() else Path(__file__).parents[3] / kind


def cache_folder() -> Path:
    """Where recomputable facts are kept: `$XDG_CACHE_HOME/hpcft`, else `~/.cache/hpcft`."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "hpcft"


def calibration_file(root: Path, cluster: str) -> Path:
    """What the runs in a runs folder have measured of a cluster."""
    return root / "calibration" / f"{cluster}.json"


def is_in_run_folder(file: Path) -> bool:
    """Returns whether a recipe or profile is a run's own copy, which hpcft wrote."""
    return file.suffix == ".json" and RunPaths(file.parent).job.exists()


@dataclass(frozen=True)
class RunPaths:
    """The files of one run, `runs/<recipe name>/<run id>/`."""

    folder: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.folder / "recipe.json"

    @property
    def cluster(self) -> Path:
        """The cluster profile as it was when submitted."""
        return self.folder / "cluster.json"

    @property
    def plan(self) -> Path:
        """The plan that the latest job was submitted with."""
        return self.folder / "plan.json"

    @property
    def current_plan(self) -> Path:
        """The plan that runs since the last rung of the ladder, for people; `recoveries` decide."""
        return self.folder / "current_plan.json"

    @property
    def recoveries(self) -> Path:
        """What the run has met and how it went on, one file each, by number."""
        return self.folder / "recoveries"

    @property
    def ds_config(self) -> Path:
        """The DeepSpeed configuration, for people; the plan holds the same."""
        return self.folder / "ds_config.json"

    @property
    def fingerprints(self) -> Path:
        """Hashes of local data and model files, commits of those of the hub."""
        return self.folder / "fingerprints.json"

    @property
    def staged(self) -> Path:
        """What the run reads from the cache instead of the hub: commits, folders, files."""
        return self.folder / "staged.json"

    @property
    def job(self) -> Path:
        """Every attempt with its job id."""
        return self.folder / "job.json"

    @property
    def logs(self) -> Path:
        """Submitit's folder: sbatch script, output of every rank."""
        return self.folder / "logs"

    @property
    def progress(self) -> Path:
        """Heartbeat of rank 0."""
        return self.folder / "progress.json"

    @property
    def metrics(self) -> Path:
        """One JSON line per logged step and per evaluation."""
        return self.folder / "metrics.jsonl"

    @property
    def rendezvous(self) -> Path:
        """Address and port of rank 0, by attempt and start; who is ready to start again."""
        return self.folder / "rendezvous"

    @property
    def prepared(self) -> Path:
        """Tokenizer, features and initial weights that rank 0 made for all."""
        return self.folder / "prepared"

    @property
    def answers(self) -> Path:
        """What a prompted model has answered so far, a file for each rank."""
        return self.folder / "answers"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints."""
        return self.folder / "checkpoints"

    @property
    def model(self) -> Path:
        """The final weights, as `transformers` or `peft` loads them."""
        return self.folder / "model"

    @property
    def result(self) -> Path:
        """What came out; written last."""
        return self.folder / "result.json"

    @property
    def previous(self) -> Path:
        """Results, metrics and errors of earlier attempts, by number."""
        return self.folder / "previous"

    @property
    def stacks(self) -> Path:
        """What each rank was doing when the run seemed stuck, a folder for each time."""
        return self.folder / "stacks"

    @property
    def errors(self) -> Path:
        """What each failing rank said last."""
        return self.folder / "errors"


def log_file(logs: Path, job_id: str, rank: int, stream: Literal["out", "err"]) -> Path:
    """Submitit's log of one rank."""
    return logs / f"{job_id}_{rank}_log.{stream}"
