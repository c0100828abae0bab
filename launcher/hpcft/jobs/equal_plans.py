"""Keeps the plans of a sweep: points that differ in nothing that a plan depends on share one."""

from __future__ import annotations

from hpcft.config.recipe_types import SweepPoint
from hpcft.core.records import Plan

WITHOUT_INFLUENCE = (
    "seed",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
)
"""Fields of `train` that no plan depends on: values of the optimizer, and not its size or time."""


class EqualPlans:
    """The plans of a sweep so far, by everything in a recipe that a plan depends on."""

    def __init__(self) -> None:
        """Starts without plans."""
        self._plans: dict[str, Plan] = {}

    def find(self, point: SweepPoint) -> Plan | None:
        """Returns the plan of an earlier point that is that of this one too; None without one."""
        return self._plans.get(_key(point))

    def add(self, point: SweepPoint, plan: Plan) -> Plan:
        """Keeps the plan of a point, and returns it."""
        self._plans[_key(point)] = plan
        return plan


def _key(point: SweepPoint) -> str:
    recipe = point.recipe
    # The seed draws the shots of a prompt, and with them its length.
    kept = {"seed"} if recipe.mode == "few_shot" else set()
    return recipe.model_dump_json(exclude={"train": set(WITHOUT_INFLUENCE) - kept})
