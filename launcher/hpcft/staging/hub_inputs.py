"""What a recipe takes from the hub, and the same recipe with folders in the place of hub names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.records import Staged
from hpcft.core.records.staged import Kind

MAIN = "main"


@dataclass(frozen=True)
class HubInput:
    """Something of the hub that has to be in the cache before a job starts."""

    kind: Kind
    name: str
    revision: str = MAIN
    config_name: str | None = None

    def __str__(self) -> str:
        words = {"dataset": "data set"}.get(self.kind, self.kind)
        config = f" ({self.config_name})" if self.config_name else ""
        revision = "" if self.revision == MAIN else f" at {self.revision}"
        return f"{words} {self.name}{config}{revision}"

    @property
    def repository(self) -> str:
        """Its folder in the Hugging Face cache."""
        kind = "datasets" if self.kind == "dataset" else "models"
        return "--".join([kind, *self.name.split("/")])


def hub_inputs_of(recipe: FullRecipe) -> dict[str, HubInput]:
    """Dotted field to what it takes from the hub; fields that name local folders are left out."""
    model, data = recipe.model, recipe.task.data
    found = {}
    if model.path is not None:
        found["model.path"] = HubInput("model", model.path, model.revision or MAIN)
    if isinstance(model.tokenizer, str):
        found["model.tokenizer"] = HubInput("tokenizer", model.tokenizer)
    if data.path is not None:
        found["task.data.path"] = HubInput("dataset", data.path, data.revision or MAIN, data.name)
    return {field: need for field, need in found.items() if not need.name.startswith("/")}


def with_folders(recipe: FullRecipe, staged: Mapping[str, Staged]) -> FullRecipe:
    """The recipe with the folder that stands for each staged hub name."""
    model, task = recipe.model, recipe.task
    if found := staged.get("model.path"):
        model = model.model_copy(update={"path": found.folder, "revision": None})
    if found := staged.get("model.tokenizer"):
        model = model.model_copy(update={"tokenizer": found.folder})
    if found := staged.get("task.data.path"):
        update = {"path": found.folder, "name": None, "revision": None}
        task = task.model_copy(update={"data": task.data.model_copy(update=update)})
    return recipe.model_copy(update={"model": model, "task": task})


def commits(staged: Mapping[str, Staged]) -> dict[str, str]:
    """What of the staged inputs makes a run another one: the commit that each field stands for."""
    found = {}
    for field, item in staged.items():
        if field == "model.tokenizer":
            found[field] = f"{item.name}@{item.commit}"
        else:
            found[field.replace("path", "revision")] = item.commit
    return found
