"""Checks a recipe across its fields, and against the local file system."""

from __future__ import annotations

import os
import re
from pathlib import Path

from hpcft.config.recipe_types import FullRecipe
from hpcft.config.yaml_document import Document
from hpcft.core.errors import Problems
from hpcft.methods.frozen import ADAPTER_FILE
from hpcft.tasks.data.examples import split_sources
from hpcft.tasks.data.file_readers import data_format, format_names

MAX_LAYERS = 1000  # eight times the deepest open model; the planner builds every layer
HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}(/[A-Za-z0-9][A-Za-z0-9_.-]{0,95})?")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")


def check_across_fields(recipe: FullRecipe, doc: Document) -> None:
    """Checks fields of a recipe against each other and against the file system.

    Args:
        recipe: the record, whose fields are right by themselves.
        doc: the document that it was read from.

    Raises:
        InputError: with all problems found.
    """
    problems = Problems(doc.location_of)
    _check_model(recipe, problems)
    _check_data(recipe, problems)
    _check_splits(recipe, problems)
    _check_train(recipe, problems)
    _check_frozen(recipe, problems)
    _check_task(recipe, problems)
    problems.raise_if_any()


def _check_model(recipe: FullRecipe, problems: Problems) -> None:
    """Checks that model and tokenizer are named or described, and that local folders are whole."""
    model = recipe.model
    if model.path is None and model.config is None:
        fix = "name a model, or describe a new one"
        problems.add("model", "needs `path` or `config`", fix=fix)
    if model.config is not None and not isinstance(model.config.get("model_type"), str):
        problems.add("model.config", "needs `model_type`", fix="for example model_type: llama")
    for key, value in (model.config or {}).items():
        if key.endswith(("layers", "n_layer")) and isinstance(value, int) and value > MAX_LAYERS:
            expected = f"at most {MAX_LAYERS}"
            problems.add(f"model.config.{key}", expected=expected, got=value, fix="lower it")
    if model.path is None and model.tokenizer is None:
        fix = "name one, or describe how to train it (vocab_size)"
        problems.add("model.tokenizer", "is required for a new model", fix=fix)
    if model.path is not None:
        has_tokenizer = model.tokenizer is None
        _check_model_folder("model.path", model.path, problems, tokenizer=has_tokenizer)
    if isinstance(model.tokenizer, str):
        _check_model_folder("model.tokenizer", model.tokenizer, problems, weights=False)


def _check_model_folder(
    key: str, path: str, problems: Problems, *, tokenizer: bool = True, weights: bool = True
) -> None:
    """Checks that a path is a hub name or a folder with what is needed.

    Args:
        key: field that has the path.
        path: hub name or folder.
        problems: collects what is wrong.
        tokenizer: whether the folder must have a tokenizer.
        weights: whether it must have a configuration and weights.
    """
    if not path.startswith("/"):
        if not HUB_NAME.fullmatch(path):
            fix = "for example org/name, or ./folder"
            problems.add(key, expected="a hub name or a folder", got=repr(path), fix=fix)
        return
    folder = Path(path)
    if not os.path.isdir(folder):
        problems.add(key, f"there is no folder {path}", fix="correct it, or give a hub name")
        return
    if weights and not (folder / "config.json").is_file():
        problems.add(key, f"{path} has no config.json", fix="name the folder of a saved model")
    if weights and not [*folder.glob("*.safetensors")]:
        fix = "save the model with save_pretrained"
        problems.add(key, f"{path} has no *.safetensors weights", fix=fix)
    if tokenizer and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        fix = "save the tokenizer there too, or set model.tokenizer"
        problems.add(key, f"{path} has no tokenizer", fix=fix)


def _check_data(recipe: FullRecipe, problems: Problems) -> None:
    """Checks that the data have one source, and that local files and folders exist."""
    data = recipe.task.data
    if (data.path is None) == (data.files is None):
        got = "neither" if data.path is None else "both"
        what = f"needs either `path` (a hub data set or a folder) or `files`, got {got}"
        problems.add("task.data", what, fix="name one of them")
    if data.path is not None and data.path.startswith("/"):
        if not os.path.isdir(data.path):
            fix = "correct it, or give a hub name"
            problems.add("task.data.path", f"there is no folder {data.path}", fix=fix)
    elif data.path is not None and not HUB_NAME.fullmatch(data.path):
        fix = "use `files` for local files"
        got = repr(data.path)
        problems.add("task.data.path", expected="a hub name or a folder", got=got, fix=fix)
    for split, file in (data.files or {}).items():
        key = f"task.data.files.{split}"
        if not os.path.exists(file):
            problems.add(key, f"there is no file {file}", fix="correct the path")
        elif not os.path.isfile(file):
            what = f"{file} is not a regular file, which can be read again when the job starts"
            problems.add(key, what, fix="name a file")
        elif data_format(Path(file)) is None:
            expected, got = format_names(), Path(file).name
            fix = "convert the file, or rename it if it has one of these formats"
            problems.add(key, expected=expected, got=got, fix=fix)
    total = sum((data.fractions or {}).values())
    if total > 1 + 1e-9:
        expected = "a sum of at most 1"
        problems.add("task.data.fractions", expected=expected, got=f"{total:g}", fix="lower one")


def _check_splits(recipe: FullRecipe, problems: Problems) -> None:
    """Checks that the data have the splits that the recipe uses."""
    data = recipe.task.data
    splits: set[str] = set(data.fractions or split_sources(data))
    existing = ", ".join(sorted(splits))
    needed = () if recipe.mode == "evaluate" else recipe.task.needed_splits
    for split in sorted(set(needed) - splits):
        fix = "add it to `files`, `splits` or `fractions`"
        problems.add("task.data", f"has no {split} split", fix=fix)
    scored = recipe.evaluation.split
    if scored not in splits:
        what = f"the data has no {scored} split"
        others = sorted(splits - {"train"})
        fix = "cut one from what there is, for example task.data.fractions: "
        fix += f"{{train: 0.8, {scored}: 0.2}}, or name it in task.data"
        if others:
            fix = f"use {' or '.join(others)}, or {fix}"
        problems.add("evaluation.split", what, fix=fix)
    _check_apart(recipe, problems)
    for field in ("sample", "limits"):
        for split in sorted(set(getattr(data, field)) - splits):
            what = "the data has no such split"
            problems.add(f"task.data.{field}.{split}", what, fix=f"use one of {existing}")
    at_end = recipe.train.load_best_model_at_end
    if at_end and (recipe.train.eval_strategy == "no" or "validation" not in splits):
        what = "needs a validation split and an eval_strategy other than no"
        problems.add("train.load_best_model_at_end", what, fix="add them, or leave it out")
    elif at_end and recipe.method.can_resume:
        _check_best_model(recipe, problems)


def _check_apart(recipe: FullRecipe, problems: Problems) -> None:
    """Checks that no split is read from the same place as the one that is trained on."""
    data = recipe.task.data
    sources = split_sources(data)
    if recipe.mode != "finetune" or "train" not in sources:
        return
    for split in sorted(set(sources) - {"train"}):
        if data.files is not None:
            is_same = _is_same_file(sources["train"], sources[split])
        else:
            parts = [{part.strip() for part in sources[s].split("+")} for s in ("train", split)]
            is_same = bool(parts[0] & parts[1])
        if is_same:
            what = f"the rows of {sources[split]} are trained on, too (train: {sources['train']})"
            fix = "name other rows, or name these only as train and cut them by task.data.fractions"
            kind = "files" if data.files is not None else "splits"
            problems.add(f"task.data.{kind}.{split}", what, fix=fix)


def _is_same_file(first: str, second: str) -> bool:
    try:
        return os.path.samefile(first, second)
    except OSError:
        return False  # A missing file is a problem of its own.


def _check_best_model(recipe: FullRecipe, problems: Problems) -> None:
    """Checks what `TrainingArguments` would refuse in the job: each checkpoint needs a metric."""
    train = recipe.train
    if train.save_strategy != train.eval_strategy:
        expected = f"{train.eval_strategy}, as eval_strategy, because of load_best_model_at_end"
        fix = f"set save_strategy: {train.eval_strategy}, or leave out load_best_model_at_end"
        problems.add("train.save_strategy", expected=expected, got=train.save_strategy, fix=fix)
    elif train.eval_strategy == "steps":
        eval_steps = train.eval_steps or train.logging_steps  # The Trainer's own default.
        if train.save_steps % eval_steps:
            expected = f"a multiple of eval_steps ({eval_steps}), so that each checkpoint is scored"
            fix = f"set save_steps: {-(-train.save_steps // eval_steps) * eval_steps}"
            problems.add("train.save_steps", expected=expected, got=train.save_steps, fix=fix)


def _check_train(recipe: FullRecipe, problems: Problems) -> None:
    """Checks the options of `train` against each other, the method and the task."""
    train, method = recipe.train, recipe.method
    if train.bf16 is True and train.fp16 is True:
        problems.add("train.fp16", "bf16 and fp16 exclude each other", fix="keep one")
    batch = train.per_device_train_batch_size
    if batch != "auto" and train.global_batch_size % batch:
        what = f"{batch} does not divide global_batch_size {train.global_batch_size}"
        fix = "use a divisor, or auto"
        problems.add("train.per_device_train_batch_size", what, fix=fix)
    if not method.can_resume and (train.save_strategy != "no" or train.load_best_model_at_end):
        key = "load_best_model_at_end" if train.save_strategy == "no" else "save_strategy"
        what = f"the method {method.name} saves no checkpoints to resume from"
        problems.add(f"train.{key}", what, fix="leave it out, or use another method")
    names = ["loss", *recipe.task.metric_names()]
    if train.metric_for_best_model not in (None, *names):
        what = f"the task has no metric {train.metric_for_best_model!r}"
        problems.add("train.metric_for_best_model", what, fix=f"use one of {', '.join(names)}")


def _check_frozen(recipe: FullRecipe, problems: Problems) -> None:
    """Checks a recipe whose method trains nothing: the model is scored as it is."""
    if recipe.method.trains:
        return
    if recipe.evaluation.before:
        what = f"the method {recipe.method.name} trains nothing, so there is no before and after"
        problems.add("evaluation.before", what, fix="leave it out")
    if recipe.model.path is None and recipe.mode == "evaluate":
        what = "is required: a new model has learnt nothing that could be scored"
        problems.add("model.path", what, fix="name a trained model, or use a method that trains")
    folder = recipe.method.adapter_folder
    if folder and not os.path.isfile(Path(folder) / ADAPTER_FILE):
        fix = "name the folder of a saved adapter, for example runs/NAME/ID/model"
        problems.add("method.adapter_path", f"{folder} has no {ADAPTER_FILE}", fix=fix)


def _check_task(recipe: FullRecipe, problems: Problems) -> None:
    """Checks the options of the task, and that it goes with the method."""
    if recipe.mode == "few_shot" and recipe.method.trains:
        what = f"the task {recipe.task.name} trains nothing, but the method {recipe.method.name} "
        problems.add("method.name", what + "does", fix="use method: {name: frozen}")
    for field, what, fix in recipe.task.problems():
        problems.add(f"task.{field}", what, fix=fix)
