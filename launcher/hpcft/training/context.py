"""WorkerContext: what a training process knows of its run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.paths import RunPaths
from hpcft.core.records import Plan
from hpcft.recovery.run import Run
from hpcft.training.distributed.rank_env import RankInfo

if TYPE_CHECKING:  # it imports transformers, before which the environment has to be set
    from hpcft.training.telemetry.progress import ProgressReporter


@dataclass(frozen=True)
class WorkerContext:
    """One training process: its run, its rank, and the plan that it goes by."""

    run: Run
    """The run."""
    plan: Plan
    """The plan that runs now, read once when the process started."""
    reporter: ProgressReporter
    """Writes progress, metrics and measurements."""
    restart_index: int = 0
    """Number of recoveries before this process started."""

    @property
    def rank(self) -> RankInfo:
        """This process among the ranks."""
        return self.reporter.rank

    @property
    def paths(self) -> RunPaths:
        """The run's files."""
        return self.run.paths

    @property
    def recipe(self) -> FullRecipe:
        """The run's recipe."""
        return self.run.recipe
