"""Names the files of a run folder, and finds the recipes, profiles and templates of hpcft."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

DEFAULT_RUNS = Path("runs")


def shipped_folder(kind: Literal["recipes", "ds_configs", "slurm"]) -> Path:
    """Returns the folder of a kind of files that come with hpcft: in the wheel or the checkout."""
    return _shipped(kind)


def tested_versions_file() -> Path:
    """Returns the constraints file with the package versions that hpcft was tested with."""
    return _shipped("constraints.txt")


def _shipped(name: str) -> Path:
    in_wheel = Path(__file__).parents[1] / "shipped" / name
    return in_wheel if in_wheel.exists() else Path(__file__).parents[3] / name


def cache_folder() -> Path:
    """Returns the cache folder: `$XDG_CACHE_HOME/hpcft`, else `~/.cache/hpcft`."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "hpcft"


def calibration_file(root: Path, cluster: str) -> Path:
    """Returns the path of a cluster's calibration, which the runs of a runs folder measured."""
    return root / "calibration" / f"{cluster}.json"


def is_in_run_folder(file: Path) -> bool:
    """Returns whether a recipe or profile is the copy in a run folder, which hpcft wrote."""
    return file.suffix == ".json" and RunPaths(file.parent).job.exists()


@dataclass(frozen=True)
class RunPaths:
    """The paths inside one run folder, `runs/<recipe name>/<run id>/`."""

    folder: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.folder / "recipe.json"

    @property
    def cluster(self) -> Path:
        """The cluster profile at the time of submission."""
        return self.folder / "cluster.json"

    @property
    def plan(self) -> Path:
        """The plan of the latest submission."""
        return self.folder / "plan.json"

    @property
    def current_plan(self) -> Path:
        """The plan that runs now: of the submission, or of the latest recovery."""
        return self.folder / "current_plan.json"

    @property
    def recoveries(self) -> Path:
        """The folder of recoveries, one numbered file each."""
        return self.folder / "recoveries"

    @property
    def ds_config(self) -> Path:
        """The DeepSpeed configuration, a copy for people of the one in the plan."""
        return self.folder / "ds_config.json"

    @property
    def fingerprints(self) -> Path:
        """The hashes of local data and model files, and the commits of those from the hub."""
        return self.folder / "fingerprints.json"

    @property
    def staged(self) -> Path:
        """The staged inputs, which the run reads from the cache instead of the hub."""
        return self.folder / "staged.json"

    @property
    def job(self) -> Path:
        """The job record: every attempt with its job id."""
        return self.folder / "job.json"

    @property
    def logs(self) -> Path:
        """Submitit's folder: the sbatch script and the logs of every rank."""
        return self.folder / "logs"

    @property
    def progress(self) -> Path:
        """The heartbeat of rank 0."""
        return self.folder / "progress.json"

    @property
    def metrics(self) -> Path:
        """The metrics, one JSON line per logged step and per evaluation."""
        return self.folder / "metrics.jsonl"

    @property
    def rendezvous(self) -> Path:
        """The rendezvous folder: rank 0's address and port at each start, and the ready ranks."""
        return self.folder / "rendezvous"

    @property
    def prepared(self) -> Path:
        """The tokenizer, features and initial weights that rank 0 prepared for all ranks."""
        return self.folder / "prepared"

    @property
    def answers(self) -> Path:
        """The answers of a prompted model so far, one file per rank."""
        return self.folder / "answers"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.folder / "checkpoints"

    @property
    def model(self) -> Path:
        """The final weights, as `transformers` or `peft` loads them."""
        return self.folder / "model"

    @property
    def result(self) -> Path:
        """The result, written last."""
        return self.folder / "result.json"

    @property
    def previous(self) -> Path:
        """The archive of earlier attempts: their results, metrics and errors, by number."""
        return self.folder / "previous"

    @property
    def stacks(self) -> Path:
        """The stacks of all ranks at each time that the run seemed to hang, one folder per time."""
        return self.folder / "stacks"

    @property
    def errors(self) -> Path:
        """The error files of the ranks that failed."""
        return self.folder / "errors"


def log_file(logs: Path, job_id: str, rank: int, stream: Literal["out", "err"]) -> Path:
    """Returns the path of submitit's log of one rank."""
    return logs / f"{job_id}_{rank}_log.{stream}"
