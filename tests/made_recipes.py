"""Recipe files written by a test, and what becomes of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcft.config import recipe
from hpcft.config.recipe_types import FullRecipe
from hpcft.core.errors import InputError


def one(*overrides: str, name: str = "tiny.yaml") -> FullRecipe:
    """The only point of a recipe file."""
    (point,) = recipe.load_recipe(name, list(overrides))
    return point.recipe


def problems(*overrides: str, name: str = "tiny.yaml") -> list[str]:
    """What is said of a recipe that is refused."""
    with pytest.raises(InputError) as error:
        recipe.load_recipe(name, list(overrides))
    return [str(problem) for problem in error.value.problems]


def write(name: str, text: str) -> Path:
    """Writes a file and the folders that it lies in."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path
