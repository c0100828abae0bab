"""Checks that a local tokenizer tells a task's choices apart, before anything is queued."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hpcft.config.recipe_checks import TOKENIZER_FILES
from hpcft.config.recipe_types import FullRecipe
from hpcft.staging.verify import load_tokenizer
from hpcft.tasks.base import Example

CHECKED_EXAMPLES = 100
"""Examples that are tokenized before a run is queued; the run itself looks at all of them."""


def check_choices(local: FullRecipe, examples: Sequence[Example]) -> None:
    """Checks the choices of the first scored examples, if the tokenizer is on this machine.

    Args:
        local: a recipe without hub names.
        examples: the examples that are scored.

    Raises:
        DataError: two choices have the same tokens, or the tokenizer cannot be loaded.
    """
    folder = _tokenizer_folder(local)
    if folder is not None:
        local.task.check_tokens(examples[:CHECKED_EXAMPLES], load_tokenizer(str(folder)))


def tokenizer_state(local: FullRecipe) -> list[list[str | int]]:
    """Returns path, size and time of the files that `check_choices` depends on."""
    folder = _tokenizer_folder(local)
    files = [folder / name for name in TOKENIZER_FILES] if folder else []
    states = [(file, file.stat()) for file in files if file.is_file()]
    return [[str(file), state.st_size, state.st_mtime_ns] for file, state in states]


def _tokenizer_folder(local: FullRecipe) -> Path | None:
    """Returns the folder of the tokenizer; None if it is not here, or no choices are compared."""
    source = local.model.tokenizer or local.model.path
    if not local.task.compares_choices or not isinstance(source, str):
        return None
    return Path(source) if Path(source).is_absolute() and Path(source).is_dir() else None
