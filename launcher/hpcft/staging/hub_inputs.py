"""Lists the hub inputs of a recipe, and puts their local folders in the place of hub names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.records import Staged
from hpcft.core.records.staged import Kind

MAIN = "main"


@dataclass(frozen=True)
class HubInput:
    """A model, tokenizer or data set of the hub that a recipe names."""

    kind: Kind
    """Kind of the input; `tokenizer` is only that part of a model's repository."""
    name: str
    """Name of the repository."""
    revision: str = MAIN
    """Branch, tag or commit."""
    config_name: str | None = None
    """Configuration of a data set."""

    def __str__(self) -> str:
        words = {"dataset": "data set"}.get(self.kind, self.kind)
        config = f" ({self.config_name})" if self.config_name else ""
        revision = "" if self.revision == MAIN else f" at {self.revision}"
        return f"{words} {self.name}{config}{revision}"

    @property
    def cache_folder_name(self) -> str:
        """Name of the repository's folder in the Hugging Face cache."""
        kind = "datasets" if self.kind == "dataset" else "models"
        return "--".join([kind, *self.name.split("/")])


def hub_inputs_of(recipe: FullRecipe) -> dict[str, HubInput]:
    """Returns the hub inputs of a recipe by dotted field; local folders are left out."""
    model, data = recipe.model, recipe.task.data
    inputs = {}
    if model.path is not None:
        inputs["model.path"] = HubInput("model", model.path, model.revision or MAIN)
    if isinstance(model.tokenizer, str):
        inputs["model.tokenizer"] = HubInput("tokenizer", model.tokenizer)
    if data.path is not None:
        inputs["task.data.path"] = HubInput("dataset", data.path, data.revision or MAIN, data.name)
    return {field: item for field, item in inputs.items() if not item.name.startswith("/")}


def with_folders(recipe: FullRecipe, staged: Mapping[str, Staged]) -> FullRecipe:
    """Returns the recipe with the staged folders in the place of hub names.

    Args:
        recipe: a recipe with hub names.
        staged: staged inputs by dotted field.
    """
    model, task = recipe.model, recipe.task
    if item := staged.get("model.path"):
        model = model.model_copy(update={"path": item.folder, "revision": None})
    if item := staged.get("model.tokenizer"):
        model = model.model_copy(update={"tokenizer": item.folder})
    if item := staged.get("task.data.path"):
        update = {"path": item.folder, "name": None, "revision": None}
        task = task.model_copy(update={"data": task.data.model_copy(update=update)})
    return recipe.model_copy(update={"model": model, "task": task})


def staged_commits(staged: Mapping[str, Staged]) -> dict[str, str]:
    """Returns the commit of each staged input, by the field that it replaces in the run's id."""
    commits = {}
    for field, item in staged.items():
        if field == "model.tokenizer":
            commits[field] = f"{item.name}@{item.commit}"
        else:
            commits[field.replace("path", "revision")] = item.commit
    return commits
