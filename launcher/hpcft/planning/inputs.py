"""PlanInputs: everything that a plan follows from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.records import Cluster, ModelFacts, Plan, Precision, Split
from hpcft.methods import AnyMethod
from hpcft.planning.hardware import choose_precision
from hpcft.planning.memory.step_memory import step_memory
from hpcft.planning.memory.trace_types import StepMemory, TracedStep


@dataclass(frozen=True)
class PlanInputs:
    """The recipe, the cluster and the model that are planned for."""

    recipe: FullRecipe
    """Recipe in which `check_resources` finds no problem."""
    cluster: Cluster
    """Profile of the cluster."""
    facts: ModelFacts
    """Parameter counts and dimensions of the model."""
    load_bytes: int = 0
    """Size of the largest weight file, which a rank reads at once."""
    examples: Mapping[Split, int] = field(default_factory=dict)
    """Number of examples of each split where it is known."""
    trace: Callable[[TracedStep], StepMemory] = step_memory
    """Function that gives the memory of a training step; tests pass closed forms."""
    fixed_precision: Precision | None = None
    """Precision of an existing plan; None: chosen from recipe and cluster."""

    @classmethod
    def of_plan(cls, recipe: FullRecipe, cluster: Cluster, plan: Plan) -> PlanInputs:
        """Returns the inputs of a plan that exists, in the precision that it says."""
        return cls(recipe, cluster, plan.facts, fixed_precision=plan.precision)

    @cached_property
    def precision(self) -> Precision:
        """Compute precision."""
        return self.fixed_precision or choose_precision(self.recipe.train, self.cluster)

    @property
    def method(self) -> AnyMethod:
        """Training method of the recipe."""
        return self.recipe.method

    @property
    def optim(self) -> str:
        """Optimizer of the recipe, in the Trainer's words."""
        return self.recipe.train.optim

    @property
    def on_gpu(self) -> bool:
        """Whether ranks compute on GPUs."""
        return self.cluster.accelerator == "cuda"

    def with_recipe(self, recipe: FullRecipe) -> PlanInputs:
        """Returns the same inputs with another recipe."""
        return replace(self, recipe=recipe)

    def with_cluster(self, **changes: object) -> PlanInputs:
        """Returns the same inputs with fields of the cluster changed."""
        return replace(self, cluster=self.cluster.model_copy(update=changes))
