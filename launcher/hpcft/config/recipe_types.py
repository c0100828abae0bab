"""Defines a recipe with its task and method, and the points of its sweep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from pydantic import JsonValue

from hpcft.config.yaml_document import Document
from hpcft.core.records import Recipe
from hpcft.methods import AnyMethod
from hpcft.tasks import AnyTask, packing
from hpcft.tasks.base import Mode
from hpcft.tasks.few_shot.task import FewShot


class FullRecipe(Recipe):
    """A recipe: what to train, on what, how, and what others reported."""

    task: AnyTask
    """The task and its data."""
    method: AnyMethod
    """The training method."""

    @property
    def mode(self) -> Mode:
        """Mode of a run of this recipe, which task and method decide."""
        return self.task.mode(trains=self.method.trains)

    @property
    def few_shot_task(self) -> FewShot:
        """The task of a recipe whose mode is `few_shot`."""
        assert self.mode == "few_shot"
        return cast("FewShot", self.task)

    def packs(self, model_type: str) -> bool:
        """Returns whether a model of this type is trained with several examples in a row."""
        why_not = packing.packing_blocker(self.task, self.method, self.model, model_type)
        return self.train.packing is not False and why_not is None


@dataclass(frozen=True)
class SweepPoint:
    """One run of a recipe; a recipe without a sweep has one point."""

    values: dict[str, JsonValue]
    """Swept values by dotted field; empty without a sweep."""
    recipe: FullRecipe
    """The recipe with the swept values filled in."""
    document: Document
    """The YAML that the recipe was read from, so that later errors can name a line."""

    def location_of(self, key: str) -> str:
        """Returns the `file:line`, or the option, that a dotted key was written in."""
        return self.document.location_of(key)
