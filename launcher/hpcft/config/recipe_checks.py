"""Checks a recipe across its fields, and against the local file system."""

from __future__ import annotations

import os
import re
from pathlib import Path

from hpcft.config.recipe_types import FullRecipe
from hpcft.config.yaml_document import Loc
from hpcft.methods.frozen import ADAPTER_FILE
from hpcft.tasks.data.examples import split_sources

MAX_LAYERS = 1000  # eight times those of the deepest open model; the planner builds each of them


_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}(/[A-Za-z0-9][A-Za-z0-9_.-]{0,95})?")


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")


def check_across_fields(recipe: FullRecipe) -> list[tuple[Loc, str, str]]:
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
    splits: set[str] = set(data.fractions or split_sources(data))
    for needed in set(() if recipe.mode == "evaluate" else recipe.task.needed_splits) - splits:
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
    if not recipe.method.can_resume and (
        train.save_strategy != "no" or train.load_best_model_at_end
    ):
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
    if recipe.method.trains:
        return []
    found: list[tuple[Loc, str, str]] = []
    if recipe.evaluation.before:
        found.append((("evaluation", "before"), "nothing is trained", "leave it out"))
    if recipe.model.path is None and recipe.mode == "evaluate":
        what = "a new model has nothing that could be scored"
        found.append((("model", "path"), what, "name a model that was trained"))
    folder = recipe.method.adapter_folder
    if folder and not os.path.isfile(Path(folder) / ADAPTER_FILE):
        fix = "name the folder of a saved adapter, for example runs/NAME/ID/model"
        found.append((("method", "adapter_path"), f"{folder} has no {ADAPTER_FILE}", fix))
    return found


def _prompting_checks(recipe: FullRecipe) -> list[tuple[Loc, str, str]]:
    """What is wrong with prompting, which trains nothing."""
    found: list[tuple[Loc, str, str]] = []
    if recipe.mode == "few_shot" and recipe.method.trains:
        what = f"the task prompting trains nothing, {recipe.method.name} does"
        found.append((("method", "name"), what, "use method: {name: frozen}"))
    return found + [(("task", key), what, fix) for key, what, fix in recipe.task.problems()]


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
