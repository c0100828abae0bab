"""PlanInputs: everything that a plan follows from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.records import Cluster, ModelFacts, Split
from hpcft.planning.memory.step_memory import step_memory
from hpcft.planning.memory.trace_types import StepMemory, TracedStep


@dataclass(frozen=True)
class PlanInputs:
    """What is planned: everything that the plan follows from."""

    recipe: FullRecipe
    """What to train; `problems` found nothing in it."""
    cluster: Cluster
    """What there is."""
    facts: ModelFacts
    """The model's counts and dimensions."""
    load_bytes: int = 0
    """The largest file that a rank reads at once when loading weights."""
    examples: Mapping[Split, int] = field(default_factory=dict)
    """Examples of the splits whose size is known."""
    trace: Callable[[TracedStep], StepMemory] = step_memory
    """How the memory of a step is known."""

    def with_recipe(self, recipe: FullRecipe) -> PlanInputs:
        """The same case with another recipe."""
        return replace(self, recipe=recipe)

    def with_cluster(self, **changes: object) -> PlanInputs:
        """The same case on a cluster with fields changed."""
        return replace(self, cluster=self.cluster.model_copy(update=changes))
