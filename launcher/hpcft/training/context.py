"""WorkerContext: a worker's run, rank and plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.paths import RunPaths
from hpcft.core.records import Plan
from hpcft.recovery.run import Run
from hpcft.training.distributed.rank_env import RankInfo

if TYPE_CHECKING:  # The module imports transformers, before which the environment has to be set.
    from hpcft.training.telemetry.progress import ProgressReporter


@dataclass(frozen=True)
class WorkerContext:
    """Everything that the modes of a worker need: run, plan, rank and reporter."""

    run: Run
    """The run."""
    plan: Plan
    """The plan that runs now, read once when the process started."""
    reporter: ProgressReporter
    """Writer of progress, metrics and measurements."""
    restart_index: int = 0
    """Number of recoveries before this process started."""
    planned_bytes: int | None = None
    """Memory per rank that the submitted plan predicts, in bytes; a fallback takes less."""

    @property
    def rank(self) -> RankInfo:
        """Place of this process among the ranks."""
        return self.reporter.rank

    @property
    def paths(self) -> RunPaths:
        """Paths of the run's files."""
        return self.run.paths

    @property
    def recipe(self) -> FullRecipe:
        """The run's recipe."""
        return self.run.recipe
