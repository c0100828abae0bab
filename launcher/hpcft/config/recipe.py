"""Loads recipes: `extends`, overrides, sweeps and paths, with all problems at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hpcft.config import sweep, validation, yaml_document
from hpcft.config.recipe_checks import check_across_fields
from hpcft.config.recipe_types import FullRecipe, SweepPoint
from hpcft.config.yaml_document import DOTTED_KEY, Document, Loc, Origin
from hpcft.core.errors import InputError, Problem
from hpcft.core.paths import is_in_run_folder, shipped_folder

MAX_EXTENDS = 8


def list_recipes() -> list[Path]:
    """Returns the files of the shipped recipes, by name."""
    return sorted(shipped_folder("recipes").glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """Returns the file of a recipe; it need not exist.

    Args:
        name: a path, or the name of a shipped recipe.
    """
    given = Path(os.path.expanduser(name))
    return given if os.path.exists(given) else _find_shipped(given) or given


def _find_shipped(given: Path) -> Path | None:
    """Returns the shipped recipe of that name; None if there is none."""
    # `recipes/x.yaml` works outside the checkout too, where the wheel brings the recipes.
    if str(given) not in (given.stem, given.name, f"recipes/{given.name}"):
        return None
    return next((path for path in list_recipes() if path.stem == given.stem), None)


def load_recipe(name: str, overrides: list[str] | None = None) -> list[SweepPoint]:
    """Loads a recipe and returns its runs: one, or one for each point of its sweep.

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
        doc = _load_with_extends(path, str(path) if os.path.exists(name) else path.name)
    for text in overrides or []:
        doc = doc.overlaid_with(_parse_override(text))
    doc = _with_absolute_paths(doc)
    recipe = _validate(doc)
    if recipe.sweep is None:
        return [SweepPoint({}, recipe, doc)]
    points = []
    problems: dict[Problem, None] = {}
    without_sweep = doc.without_section("sweep")
    for values in sweep.expand_points(recipe.sweep, doc):
        point_doc = without_sweep
        for key, value in values.items():
            part = Document(value, {(): sweep.origin_of_values(doc, key)})
            point_doc = point_doc.overlaid_with(part.nested_at(tuple(key.split("."))))
        point_doc = _with_absolute_paths(point_doc)
        try:
            points.append(SweepPoint(values, _validate(point_doc), point_doc))
        except InputError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise InputError(list(problems))
    return points


def _load_with_extends(path: Path, shown_as: str, seen: tuple[str, ...] = ()) -> Document:
    """Loads a recipe's YAML laid over that of the recipe that it extends.

    Args:
        path: file of the recipe.
        shown_as: name of the file in errors.
        seen: files of the recipes that extend this one.

    Raises:
        InputError: a file is not a recipe, or `extends` names none, leads in a circle or is too
            deep.
    """
    if not seen:
        check_names([str(path)])
    doc = yaml_document.load_document(path, shown_as)
    if not isinstance(doc.value, dict):
        what = "expected a mapping with `name`, `model`, `task` and `method`"
        fix = "see the shipped recipes (`hpcft recipes`) for examples"
        raise InputError([Problem(str(doc.origin_of(())), "", what, fix)])
    origins = dict(doc.origins)
    parent = doc.value.pop("extends", None)
    if parent is None:
        return doc
    where = str(doc.origin_of(("extends",)))

    def extends_error(what: str, fix: str) -> InputError:
        return InputError([Problem(where, "extends", what, fix)])

    name_one = "give a path from this file's folder, or a name that `hpcft recipes` lists"
    if not isinstance(parent, str) or not parent:
        raise extends_error("expected a recipe's file or name", name_one)
    sibling = path.parent / os.path.expanduser(parent)
    base = sibling if os.path.isfile(sibling) else _find_shipped(Path(parent))
    if base is None:
        raise extends_error(f"there is no recipe {parent!r}", name_one)
    seen = (*seen, os.path.realpath(path))
    if os.path.realpath(base) in seen:
        raise extends_error(f"{parent} extends this recipe in a circle", "remove one `extends`")
    if len(seen) > MAX_EXTENDS:
        what = f"expected at most {MAX_EXTENDS} recipes in a chain, got more"
        raise extends_error(what, "merge some of them")
    overlaid = _load_with_extends(base, str(base), seen).overlaid_with(doc)
    return Document(overlaid.value, {**overlaid.origins, (): origins[()]})


def _similar_names(path: Path) -> str:
    """Returns what to do about a recipe that does not exist: names that resemble its name."""
    import difflib

    try:
        beside = sorted(path.parent.glob("*.y*ml"))
    except OSError:
        beside = []
    # Quickstart.yml, quickstart.txt and quickstrat all resemble quickstart.yaml.
    names = {file.stem: str(file) for file in beside} | {p.stem: p.stem for p in list_recipes()}
    near = difflib.get_close_matches(path.stem.lower()[:100], names, n=2)
    meant = f"did you mean {' or '.join(names[name] for name in near)}? " if near else ""
    return f"{meant or 'correct the name; '}`hpcft recipes` lists the recipes that come with hpcft"


def check_names(names: list[str]) -> None:
    """Checks that there is a recipe of each name.

    Raises:
        InputError: with all problems found.
    """
    missing = [name for name in names if not os.path.exists(find_recipe(name))]
    if missing:
        what = "there is no such file"
        raise InputError([Problem(n, "", what, _similar_names(find_recipe(n))) for n in missing])


def check_overrides(overrides: list[str] | None) -> None:
    """Checks the form of overrides.

    Raises:
        InputError: with all problems found.
    """
    problems = []
    for text in overrides or []:
        try:
            _parse_override(text)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)


def _parse_override(text: str) -> Document:
    """Parses `dotted.field=value`, whose value is YAML.

    Raises:
        InputError: it has another form, or the value is not YAML.
    """
    origin = Origin(f"-o {text if text.isprintable() else ascii(text)}", None, Path.cwd())
    key, equals, value = text.partition("=")
    if not equals or not DOTTED_KEY.fullmatch(key):
        what = "expected dotted.field=value"
        fix = "for example train.seed=1, without blanks"
        raise InputError([Problem(str(origin), "", what, fix)])
    return yaml_document.parse_document(value, origin).nested_at(tuple(key.split(".")))


# ---------------------------------------------------------------- paths and checks across fields


def local_path_fields(value: dict[str, Any]) -> list[Loc]:
    """Returns the fields of a recipe that may name files or folders.

    Args:
        value: the recipe as plain values.
    """
    locs: list[Loc] = [
        ("model", "path"),
        ("model", "tokenizer"),
        ("method", "adapter_path"),
        ("task", "data", "path"),
    ]
    files = value_at(value, ("task", "data", "files"))
    if isinstance(files, dict):
        locs += [("task", "data", "files", split) for split in files]
    return locs


def value_at(value: Any, loc: Loc) -> Any:
    """Returns the value at a place of nested mappings; None if there is none."""
    for part in loc:
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _with_absolute_paths(doc: Document) -> Document:
    """Returns the document with absolute paths.

    A relative path starts from the folder of the file that it is written in, one from the command
    line from the current folder. What may be a hub name is a path if there is such a folder.
    """
    for loc in local_path_fields(doc.value):
        text = value_at(doc.value, loc)
        if not isinstance(text, str) or not text:
            continue
        origin = doc.origin_of(loc)
        target = (origin.folder or Path.cwd()) / os.path.expanduser(text)
        is_local = bool({"files", "adapter_path"} & {*loc})
        if is_local or text.startswith(("/", "./", "../", "~")) or os.path.isdir(target):
            absolute = Document(os.path.realpath(target), {(): origin})
            doc = doc.overlaid_with(absolute.nested_at(loc))
    return doc


def _validate(doc: Document) -> FullRecipe:
    """Returns the recipe that a document describes, after all checks.

    Raises:
        InputError: with all problems found.
    """
    recipe = validation.validate(doc, FullRecipe)
    check_across_fields(recipe, doc)
    return recipe
