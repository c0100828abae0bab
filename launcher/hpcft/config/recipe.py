"""YAML to Recipe: extends, overrides, sweeps, paths, and all problems at once."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from hpcft.config import yaml_document, sweep, validation
from hpcft.config.yaml_document import (DOTTED, Document, Loc, Origin, dotted)
from hpcft.core.errors import InputError, Problem
from hpcft.methods import AnyMethod
from hpcft.methods.frozen import ADAPTER_FILE, Frozen
from hpcft.core.paths import shipped
from hpcft.core.records import Recipe
from hpcft.tasks import AnyTask, packing
from hpcft.tasks.base import TrainedTask
from hpcft.tasks.few_shot.task import Prompting
from hpcft.tasks.data.examples import sources

MAX_EXTENDS = 8
MAX_LAYERS = 1000  # eight times those of the deepest open model; the planner builds each of them
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}(/[A-Za-z0-9][A-Za-z0-9_.-]{0,95})?")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")


class FullRecipe(Recipe):
    """A recipe whose task and method are those that hpcft knows."""

    task: AnyTask
    """The task and its data."""
    method: AnyMethod
    """The training method."""

    @property
    def trained_task(self) -> TrainedTask:
        """The task, of a recipe that does not prompt."""
        assert isinstance(self.task, TrainedTask)
        return self.task

    @property
    def scores_alone(self) -> bool:
        """Whether a task that models are trained for is only scored."""
        return not (self.method.trains or isinstance(self.task, Prompting))

    def packs(self, model_type: str) -> bool:
        """Whether a model of this type is trained with several examples in a row."""
        why_not = packing.obstacle(self.task, self.method, self.model, model_type)
        return self.train.packing is not False and why_not is None


@dataclass(frozen=True)
class Point:
    """One run of a recipe: the swept values and the recipe with them filled in."""

    values: dict[str, JsonValue]
    recipe: FullRecipe
    yaml_document: Document

    def where(self, loc: Loc) -> str:
        """File and line, or option, that a field was written in."""
        return str(self.document.origin_of(loc))


def available() -> list[Path]:
    """The shipped recipes, by name."""
    return sorted(shipped("recipes").glob("*.yaml"))


def find(name: str) -> Path:
    """The file of a recipe: a path, or the name of a shipped one."""
    given = Path(os.path.expanduser(name))
    return given if os.path.exists(given) else _shipped(given) or given


def _shipped(given: Path) -> Path | None:
    """The shipped recipe of that name; None where there is none."""
    # `recipes/x.yaml` works outside the checkout too, where the wheel brings the recipes.
    if str(given) not in (given.stem, given.name, f"recipes/{given.name}"):
        return None
    return next((path for path in available() if path.stem == given.stem), None)


def load(name: str, overrides: list[str] | None = None) -> list[Point]:
    """The runs that a recipe describes: one, or one for each point of its sweep.

    Args:
        name: path, or name of a shipped recipe.
        overrides: `dotted.field=value` texts from the command line.

    Raises:
        InputError: with all problems found, each with file, line, what was got and what to write.
    """
    path = find(name)
    doc = _with_extends(path, str(path) if os.path.exists(name) else path.name)
    for text in overrides or []:
        doc = doc.merged(_override(text))
    doc = _with_absolute_paths(doc)
    recipe = _validated(doc)
    if recipe.sweep is None:
        return [Point({}, recipe, doc)]
    points = []
    problems: dict[Problem, None] = {}
    unswept = doc.without("sweep")  # else every point would carry all points
    for values in sweep.points(recipe.sweep, doc):
        at_point = unswept
        for key, value in values.items():
            part = Document(value, {(): sweep.written_at(doc, key)})
            at_point = at_point.merged(part.placed(tuple(key.split("."))))
        at_point = _with_absolute_paths(at_point)
        try:
            points.append(Point(values, _validated(at_point), at_point))
        except InputError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise InputError(list(problems))
    return points


def _with_extends(path: Path, shown_as: str, seen: tuple[str, ...] = ()) -> Document:
    doc = yaml_document.load(path, shown_as)
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
    if not equals or not DOTTED.fullmatch(key):
        what = "expected dotted.field=value"
        raise InputError([Problem(str(origin), "", what, "for example train.seed=1")])
    return yaml_document.parse(value, origin).placed(tuple(key.split(".")))


# ---------------------------------------------------------------- paths and checks across fields


def path_locs(value: dict[str, Any]) -> list[Loc]:
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
    for loc in path_locs(doc.value):
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
        Problem(str(doc.origin_of(loc)), dotted(loc), what, fix)
        for loc, what, fix in _cross_checks(recipe)
    ]
    if problems:
        raise InputError(problems)
    return recipe


def _cross_checks(recipe: FullRecipe) -> list[tuple[Loc, str, str]]:
    """What is wrong between fields, or between a field and the file system."""
    found: list[tuple[Loc, str, str]] = []
    model, data, train = recipe.model, recipe.task.data, recipe.train
    if model.path is None and model.config is None:
        found.append((("model",), "needs `path` or `config`", "name a model or describe a new one"))
    if model.config is not None and not isinstance(model.config.get("model_type"), str):
        found.append((("model", "config"), "needs `model_type`", "for example model_type: llama"))
    for key, value in (model.config or {}).items():
        if key.endswith(("layers", "n_layer")) and isinstance(value, int) and value > MAX_LAYERS:
            what = f"expected at most {MAX_LAYERS}, got {value}"
            found.append((("model", "config", key), what, ""))
    if model.path is None and model.tokenizer is None:
        found.append(
            (
                ("model", "tokenizer"),
                "is required for a new model",
                "name one or describe how to train it",
            )
        )
    if model.path is not None:
        found += _check_model_folder(
            ("model", "path"), model.path, tokenizer=model.tokenizer is None
        )
    if isinstance(model.tokenizer, str):
        found += _check_model_folder(
            ("model", "tokenizer"), model.tokenizer, tokenizer=True, weights=False
        )
    if (data.path is None) == (data.files is None):
        found.append((("task", "data"), "needs either `path` (a hub data set) or `files`", ""))
    if data.path is not None and data.path.startswith("/"):
        if not os.path.isdir(data.path):
            found.append((("task", "data", "path"), f"there is no folder {data.path}", ""))
    elif data.path is not None and not _HUB_NAME.fullmatch(data.path):
        what = f"expected a hub name or a folder, got {data.path!r}"
        found.append((("task", "data", "path"), what, "use `files` for local files"))
    for split, file in (data.files or {}).items():
        loc = ("task", "data", "files", split)
        if not os.path.isfile(file):
            found.append((loc, f"there is no file {file}", ""))
        elif Path(file).suffix.lower() not in (".csv", ".jsonl", ".json", ".parquet"):
            found.append(
                (loc, f"expected .csv, .jsonl, .json or .parquet, got {Path(file).name}", "")
            )
    splits: set[str] = set(data.fractions or sources(data))
    for needed in set(() if recipe.scores_alone else recipe.task.needed_splits) - splits:
        found.append((("task", "data"), f"has no {needed} split", "add one"))
    if recipe.evaluation.split not in splits:
        found.append(
            (
                ("evaluation", "split"),
                f"the data has no {recipe.evaluation.split} split",
                f"use one of {', '.join(sorted(splits))}",
            )
        )
    for field in ("sample", "limits"):
        for split in set(getattr(data, field)) - splits:
            known = f"it has {', '.join(sorted(splits))}"
            found.append((("task", "data", field, split), "the data has no such split", known))
    if data.fractions and sum(data.fractions.values()) > 1 + 1e-9:
        found.append(
            (
                ("task", "data", "fractions"),
                f"expected a sum of at most 1, got {sum(data.fractions.values()):g}",
                "",
            )
        )
    if train.bf16 is True and train.fp16 is True:
        found.append((("train", "fp16"), "bf16 and fp16 exclude each other", "keep one"))
    batch = train.per_device_train_batch_size
    if batch != "auto" and train.global_batch_size % batch:
        found.append(
            (
                ("train", "per_device_train_batch_size"),
                f"{batch} does not divide global_batch_size {train.global_batch_size}",
                "",
            )
        )
    if train.load_best_model_at_end and (train.eval_strategy == "no" or "validation" not in splits):
        found.append(
            (("train", "load_best_model_at_end"), "needs a validation split and eval_strategy", "")
        )
    if not recipe.method.resumes and (train.save_strategy != "no" or train.load_best_model_at_end):
        what = f"{recipe.method.name} cannot go on from a checkpoint, nor go back to one"
        key = "load_best_model_at_end" if train.save_strategy == "no" else "save_strategy"
        found.append((("train", key), what, "leave it out, or use another method"))
    names = ["loss", *recipe.task.metric_names()]
    if train.metric_for_best_model not in (None, *names):
        what = f"the task has no metric {train.metric_for_best_model!r}"
        found.append((("train", "metric_for_best_model"), what, f"it has {', '.join(names)}"))
    return found + _frozen_checks(recipe) + _prompting_checks(recipe)


def _frozen_checks(recipe: FullRecipe) -> list[tuple[Loc, str, str]]:
    """What is wrong with a model that is scored as it is."""
    method = recipe.method
    if not isinstance(method, Frozen):
        return []
    found: list[tuple[Loc, str, str]] = []
    if recipe.evaluation.before:
        found.append((("evaluation", "before"), "nothing is trained", "leave it out"))
    if recipe.model.path is None and recipe.scores_alone:
        what = "a new model has nothing that could be scored"
        found.append((("model", "path"), what, "name a model that was trained"))
    folder = method.adapter_path
    if folder and not os.path.isfile(Path(folder) / ADAPTER_FILE):
        fix = "name the folder of a saved adapter, for example runs/NAME/ID/model"
        found.append((("method", "adapter_path"), f"{folder} has no {ADAPTER_FILE}", fix))
    return found


def _prompting_checks(recipe: FullRecipe) -> list[tuple[Loc, str, str]]:
    """What is wrong with prompting, which trains nothing."""
    task = recipe.task
    if not isinstance(task, Prompting):
        return []
    found: list[tuple[Loc, str, str]] = []
    if recipe.method.trains:
        what = f"the task prompting trains nothing, {recipe.method.name} does"
        found.append((("method", "name"), what, "use method: {name: frozen}"))
    return found + [(("task", key), what, fix) for key, what, fix in task.problems()]


def _check_model_folder(
    loc: Loc, path: str, *, tokenizer: bool, weights: bool = True
) -> list[tuple[Loc, str, str]]:
    if not path.startswith("/"):
        return (
            []
            if _HUB_NAME.fullmatch(path)
            else [(loc, f"expected a hub name or a folder, got {path!r}", "")]
        )
    folder = Path(path)
    if not os.path.isdir(folder):
        return [(loc, f"there is no folder {path}", "")]
    found: list[tuple[Loc, str, str]] = []
    if weights and not (folder / "config.json").is_file():
        found.append((loc, f"{path} has no config.json", "name the folder of a saved model"))
    if weights and not [*folder.glob("*.safetensors")]:
        found.append((loc, f"{path} has no *.safetensors weights", "save it with save_pretrained"))
    if tokenizer and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        found.append(
            (
                loc,
                f"{path} has no tokenizer",
                "save the tokenizer there too, or set model.tokenizer",
            )
        )
    return found
