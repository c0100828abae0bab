"""FullRecipe and the points of a sweep."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import JsonValue

from hpcft.config.yaml_document import Document, Loc
from hpcft.core.records import Recipe
from hpcft.methods import AnyMethod
from hpcft.tasks import AnyTask, packing
from hpcft.tasks.base import Mode


class FullRecipe(Recipe):
    """A recipe whose task and method are those that hpcft knows."""

    task: AnyTask
    """The task and its data."""
    method: AnyMethod
    """The training method."""

    @property
    def mode(self) -> Mode:
        """What a run of this recipe does."""
        return self.task.mode(trains=self.method.trains)

    def packs(self, model_type: str) -> bool:
        """Whether a model of this type is trained with several examples in a row."""
        why_not = packing.packing_blocker(self.task, self.method, self.model, model_type)
        return self.train.packing is not False and why_not is None


@dataclass(frozen=True)
class SweepPoint:
    """One run of a recipe: the swept values and the recipe with them filled in."""

    values: dict[str, JsonValue]
    recipe: FullRecipe
    document: Document

    def where(self, loc: Loc) -> str:
        """File and line, or option, that a field was written in."""
        return str(self.document.origin_of(loc))
