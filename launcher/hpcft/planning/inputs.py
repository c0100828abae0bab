"""PlanInputs: everything that a plan follows from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.records import Cluster, Layout, ModelFacts, Plan, Precision, Split
from hpcft.methods import AnyMethod
from hpcft.planning.core_speed import CoreSpeed
from hpcft.planning.hardware import Rates, choose_precision, hardware_rates, stated_efficiency
from hpcft.planning.learned_values import PlanKind, learned_efficiency, plan_kind
from hpcft.planning.memory.step_memory import step_memory
from hpcft.planning.memory.trace_types import StepMemory, TracedStep
from hpcft.planning.row_lengths import RowLengths

# Steps whose rows `group_by_length` sorts together, at most 50.
SORTED_STEPS = 15


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
    lengths: RowLengths | None = None
    """Lengths of the rows; None where these are not at hand."""
    core: CoreSpeed | None = None
    """Measured speed of a core, for a run on the CPUs of this machine."""
    trace: Callable[[TracedStep], StepMemory] = step_memory
    """Function that gives the memory of a training step; tests pass closed forms."""
    facts_of: Callable[[FullRecipe], ModelFacts] | None = None
    """Function that gives the facts of a changed recipe; None where none is planned."""
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

    def kind(self, layout: Layout) -> PlanKind:
        """Returns the kind of a layout, by which measured values are kept."""
        return plan_kind(self.cluster, self.facts, self.precision, layout)

    def efficiency(self, layout: Layout) -> float:
        """Returns the share of the peak FLOP/s that a layout is assumed to reach."""
        learned = learned_efficiency(self.cluster, self.kind(layout))
        if learned:
            return learned.value
        return self.core.efficiency if self.core else stated_efficiency(self.cluster)

    def padded_tokens(self, layout: Layout) -> float:
        """Returns the mean length that the rows of a micro-batch are padded to, in tokens."""
        recipe, micro = self.recipe, layout.per_device_train_batch_size
        split = "train" if self.method.trains else recipe.evaluation.split
        if self.lengths is None or split not in self.lengths.counts:
            return recipe.task.max_length
        if not self.method.trains:
            return self.lengths.padded(split, micro)
        if recipe.packs(self.facts.model_type):
            return self.lengths.mean(split)
        # Ranks wait for the one with the longest rows.
        rows, batches = micro * layout.world_size, layout.gradient_accumulation_steps
        if recipe.train.train_sampling_strategy == "group_by_length":
            batches *= SORTED_STEPS
        return self.lengths.padded(split, rows, batches)

    def scored_tokens(self, layout: Layout) -> float:
        """Returns the mean length that rows are padded to when they are scored, in tokens."""
        split, fixed = self.recipe.evaluation.split, self.recipe.evaluation
        if self.lengths is None or split not in self.lengths.counts:
            return self.recipe.task.max_length
        batch = fixed.per_device_eval_batch_size
        rows = 4 * layout.per_device_train_batch_size if batch == "auto" else batch
        return self.lengths.padded(split, rows)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step without padding, as far as the rows are known."""
        known = self.lengths and "train" in self.lengths.counts and self.lengths.mean("train")
        return round(self.recipe.train.global_batch_size * (known or self.recipe.task.max_length))

    def rates(self, layout: Layout) -> Rates:
        """Returns the rates that the ranks of a layout reach."""
        cluster, ranks = self.cluster, layout.ranks_per_node
        efficiency = self.efficiency(layout)
        return hardware_rates(cluster, self.precision, ranks, efficiency=efficiency)

    def with_recipe(self, recipe: FullRecipe) -> PlanInputs:
        """Returns the same inputs with another recipe."""
        return replace(self, recipe=recipe)

    def with_cluster(self, **changes: object) -> PlanInputs:
        """Returns the same inputs with fields of the cluster changed."""
        return replace(self, cluster=self.cluster.model_copy(update=changes))
