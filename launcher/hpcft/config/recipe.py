"""YAML to Recipe: extends, overrides, sweeps, paths, and all problems at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hpcft.config import sweep, validation, yaml_document
from hpcft.config.recipe_checks import check_across_fields
from hpcft.config.recipe_types import FullRecipe, SweepPoint
from hpcft.config.yaml_document import DOTTED_KEY, Document, Loc, Origin, dotted_key
from hpcft.core.errors import InputError, Problem
from hpcft.core.paths import is_in_run_folder, shipped

MAX_EXTENDS = 8


def list_recipes() -> list[Path]:
    """The shipped recipes, by name."""
    return sorted(shipped("recipes").glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """The file of a recipe: a path, or the name of a shipped one."""
    given = Path(os.path.expanduser(name))
    return given if os.path.exists(given) else _shipped(given) or given


def _shipped(given: Path) -> Path | None:
    """The shipped recipe of that name; None where there is none."""
    # `recipes/x.yaml` works outside the checkout too, where the wheel brings the recipes.
    if str(given) not in (given.stem, given.name, f"recipes/{given.name}"):
        return None
    return next((path for path in list_recipes() if path.stem == given.stem), None)


def load_recipe(name: str, overrides: list[str] | None = None) -> list[SweepPoint]:
    """The runs that a recipe describes: one, or one for each point of its sweep.

    Args:
        name: path, or name of a shipped recipe.
        overrides: `dotted.field=value` texts from the command line.

    Raises:
        InputError: with all problems found, each with file, line, what was got and what to write.
    """
    path = find_recipe(name)
    if is_in_run_folder(path):
        doc = yaml_document.stored_document(path, FullRecipe)
    else:
        doc = _with_extends(path, str(path) if os.path.exists(name) else path.name)
    for text in overrides or []:
        doc = doc.merged(_override(text))
    doc = _with_absolute_paths(doc)
    recipe = _validated(doc)
    if recipe.sweep is None:
        return [SweepPoint({}, recipe, doc)]
    points = []
    problems: dict[Problem, None] = {}
    unswept = doc.without("sweep")  # else every point would carry all points
    for values in sweep.expand_points(recipe.sweep, doc):
        at_point = unswept
        for key, value in values.items():
            part = Document(value, {(): sweep.origin_of_values(doc, key)})
            at_point = at_point.merged(part.placed(tuple(key.split("."))))
        at_point = _with_absolute_paths(at_point)
        try:
            points.append(SweepPoint(values, _validated(at_point), at_point))
        except InputError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise InputError(list(problems))
    return points


def _with_extends(path: Path, shown_as: str, seen: tuple[str, ...] = ()) -> Document:
    doc = yaml_document.load_document(path, shown_as)
    if not isinstance(doc.value, dict):
        what = "expected a mapping with `name`, `model`, `task`, …"
        raise InputError([Problem(str(doc.origin_of(())), "", what)])
    origins = dict(doc.origins)
    parent = doc.value.pop("extends", None)
    if parent is None:
        return doc
    where = str(doc.origin_of(("extends",)))
    if not isinstance(parent, str) or not parent:
        raise InputError([Problem(where, "extends", "expected a recipe's file or name")])
    beside = path.parent / os.path.expanduser(parent)
    base = beside if os.path.isfile(beside) else _shipped(Path(parent))
    if base is None:
        raise InputError([Problem(where, "extends", f"there is no recipe {parent!r}")])
    seen = (*seen, os.path.realpath(path))
    if os.path.realpath(base) in seen:
        raise InputError([Problem(where, "extends", f"{parent} extends this recipe in a circle")])
    if len(seen) > MAX_EXTENDS:
        raise InputError([Problem(where, "extends", f"more than {MAX_EXTENDS} recipes in a chain")])
    merged = _with_extends(base, str(base), seen).merged(doc)
    return Document(merged.value, {**merged.origins, (): origins[()]})


def _override(text: str) -> Document:
    origin = Origin(f"-o {text if text.isprintable() else ascii(text)}", None, Path.cwd())
    key, equals, value = text.partition("=")
    if not equals or not DOTTED_KEY.fullmatch(key):
        what = "expected dotted.field=value"
        raise InputError([Problem(str(origin), "", what, "for example train.seed=1")])
    return yaml_document.parse_document(value, origin).placed(tuple(key.split(".")))


# ---------------------------------------------------------------- paths and checks across fields


def local_path_fields(value: dict[str, Any]) -> list[Loc]:
    """The fields of a recipe that name files or folders."""
    locs: list[Loc] = [
        ("model", "path"),
        ("model", "tokenizer"),
        ("method", "adapter_path"),
        ("task", "data", "path"),
    ]
    data = value_at(value, ("task", "data", "files"))
    return (
        [*locs, *(("task", "data", "files", split) for split in data)]
        if isinstance(data, dict)
        else locs
    )


def value_at(value: Any, loc: Loc) -> Any:
    """What stands at a place of nested mappings; None where there is nothing."""
    for part in loc:
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _with_absolute_paths(doc: Document) -> Document:
    """Relative paths made absolute: from the file that they stand in, or the current folder."""
    for loc in local_path_fields(doc.value):
        text = value_at(doc.value, loc)
        if not isinstance(text, str) or not text:
            continue
        origin = doc.origin_of(loc)
        target = (origin.folder or Path.cwd()) / os.path.expanduser(text)
        is_local = bool({"files", "adapter_path"} & {*loc})
        if is_local or text.startswith(("/", "./", "../", "~")) or os.path.isdir(target):
            absolute = Document(os.path.realpath(target), {(): origin})
            doc = doc.merged(absolute.placed(loc))
    return doc


def _validated(doc: Document) -> FullRecipe:
    recipe = validation.validate(doc, FullRecipe)
    problems = [
        Problem(str(doc.origin_of(loc)), dotted_key(loc), what, fix)
        for loc, what, fix in check_across_fields(recipe)
    ]
    if problems:
        raise InputError(problems)
    return recipe
