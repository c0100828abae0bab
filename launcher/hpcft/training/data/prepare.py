"""Prepares a run's data on rank 0: tokenizer, model inputs, weights of a new model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoTokenizer, set_seed

from hpcft.config import identity
from hpcft.config.hf_model import auto_model_class, build_model_config
from hpcft.config.recipe_types import FullRecipe
from hpcft.core.errors import DataError
from hpcft.core.files import read_record, write_record
from hpcft.core.paths import RunPaths
from hpcft.core.records import Fingerprints, StoredRecord
from hpcft.staging import staged_inputs
from hpcft.tasks.base import INPUT_KEYS, Example, ModelInputs, TrainedTask
from hpcft.tasks.data.examples import load_examples
from hpcft.training.context import WorkerContext
from hpcft.training.data import few_shot_prompts
from hpcft.training.data.tokenizer import make_tokenizer
from hpcft.training.distributed import rank_env, rendezvous, torch_extensions


class DataSummary(StoredRecord):
    """Size of the prepared data; the file is written last."""

    examples: dict[str, int]
    """Number of examples, by split."""
    tokens: dict[str, int]
    """Number of tokens without padding, by split."""
    notes: list[str]
    """Notes on the data for the reader of the result."""


class PreparedSplit:
    """Model inputs of a split for the Trainer, with the examples that its metrics need."""

    def __init__(self, features: Any, examples: list[Example]) -> None:
        self.features = features
        self.examples = examples

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self.features[index]
        return row

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        import pyarrow.compute  # imported here, because only training uses it

        column = self.features.data.column("input_ids")
        lengths: list[int] = pyarrow.compute.list_value_length(column).to_pylist()
        return lengths

    def read_rows(self, indices: Sequence[int]) -> list[ModelInputs]:
        """Reads several rows at once."""
        rows: list[ModelInputs] = self.features.__getitems__(list(indices))
        return rows


def prepare_all_ranks(context: WorkerContext) -> DataSummary:
    """Prepares the data on rank 0, then joins all ranks; returns the size of the data."""
    plan, reporter, index = context.plan, context.reporter, context.restart_index
    if index:  # metrics.jsonl continues from a checkpoint, or starts from step 0.
        last = context.run.read_recoveries()[-1]
        values = {"number": last.number, "change": last.change, "action": last.action}
        reporter.log("recovery", values)
    reporter.set(phase="data")
    if plan.ds_config is not None:
        torch_extensions.use_own_lock()
    if context.rank.is_first:
        prepare_data(context.paths, context.recipe)
        torch_extensions.build_operators(plan)
    if not rank_env.single_process(plan):
        rendezvous.join_rendezvous(context.paths, context.run.cluster, context.rank, index)
    return read_record(context.paths.prepared / "summary.json", DataSummary)


def prepare_data(paths: RunPaths, recipe: FullRecipe) -> None:
    """Writes the folder `prepared/`, unless an earlier start has finished it.

    Args:
        paths: the run's files.
        recipe: the run's recipe.

    Raises:
        DataError: the data cannot be used, or has changed since the run was submitted.
    """
    summary = paths.prepared / "summary.json"
    if summary.exists():
        return
    _check_unchanged(paths)
    shutil.rmtree(paths.prepared, ignore_errors=True)
    paths.prepared.mkdir(mode=0o700)
    is_trained = recipe.mode == "finetune"
    examples = load_examples(recipe.task, recipe.evaluation.split if is_trained else None)
    tokenizer = make_tokenizer(recipe, examples.splits.get("train", []))
    tokenizer.save_pretrained(paths.prepared / "tokenizer")
    if recipe.mode == "few_shot":
        tokens, notes = few_shot_prompts.write_prompts(paths, recipe, examples.splits, tokenizer)
    else:
        tokens, notes = _write_features(paths, recipe.task.as_trained, examples.splits, tokenizer)
    if recipe.model.path is None:
        write_initial_weights(recipe, tokenizer, paths.prepared / "model")
    counts = {split: len(rows) for split, rows in examples.splits.items()}
    notes = [*examples.notes, *examples.warnings, *notes]
    write_record(summary, DataSummary(examples=counts, tokens=tokens, notes=notes))


def _write_features(
    paths: RunPaths, task: TrainedTask, splits: Mapping[str, list[Example]], tokenizer: Any
) -> tuple[dict[str, int], list[str]]:
    """Writes the model inputs and examples of all splits; returns tokens by split, and notes."""
    tokens, notes = {}, []
    for split, examples in splits.items():
        make_features = task.training_features if split == "train" else task.scoring_features
        kept_examples, inputs = [], []
        for example in examples:
            rows = make_features(example, tokenizer)
            for_metrics = [{k: v for k, v in row.items() if k not in INPUT_KEYS} for row in rows]
            kept_examples.append({**example, "rows": for_metrics} if any(for_metrics) else example)
            inputs += [{k: v for k, v in row.items() if k in INPUT_KEYS} for row in rows]
        cut = sum(len(row["input_ids"]) >= task.max_length for row in inputs)
        if cut and task.cuts_texts:
            notes.append(f"{split}: {cut} of {len(inputs)} texts reach max_length and may be cut")
        tokens[split] = sum(len(row["input_ids"]) for row in inputs)
        datasets.Dataset.from_list(inputs).save_to_disk(paths.prepared / split)
        text = json.dumps(kept_examples, ensure_ascii=False)
        (paths.prepared / f"{split}.json").write_text(text, encoding="utf-8")
    return tokens, notes


def load_split(paths: RunPaths, split: str) -> PreparedSplit | None:
    """Opens a prepared split, memory-mapped; returns None if the data has no such split."""
    folder = paths.prepared / split
    if not folder.is_dir():
        return None
    examples = json.loads((paths.prepared / f"{split}.json").read_text(encoding="utf-8"))
    return PreparedSplit(datasets.Dataset.load_from_disk(folder), examples)


def load_tokenizer(paths: RunPaths) -> Any:
    """Loads the run's tokenizer."""
    return AutoTokenizer.from_pretrained(paths.prepared / "tokenizer")


def _check_unchanged(paths: RunPaths) -> None:
    """Checks that local and staged files are those that the run was submitted with."""
    staged_inputs.check_staged_of_run(paths)
    recipe = read_record(paths.recipe, FullRecipe)
    submitted = read_record(paths.fingerprints, Fingerprints)
    now = identity.compute_fingerprints(recipe, partly=not submitted.are_whole)
    for key, value in now.items():
        if submitted.files.get(key) not in (None, value):
            raise DataError(
                f"{key}: the files have changed since the run was submitted: restore them, or "
                "submit the run again (hpcft submit)"
            )


def write_initial_weights(recipe: FullRecipe, tokenizer: Any, folder: Path) -> None:
    """Writes initial weights, drawn by the recipe's seed, to a file that all ranks load.

    So they are the same for any number of ranks; under `zero.Init` they would not be.
    """
    config = build_model_config(recipe.model, recipe.task)
    if len(tokenizer) > config.vocab_size:
        raise DataError(
            f"model.config.vocab_size: {config.vocab_size} is less than the tokenizer's "
            f"{len(tokenizer)}; raise it or lower model.tokenizer.vocab_size"
        )
    config.pad_token_id = tokenizer.pad_token_id
    set_seed(recipe.train.seed)
    auto_model_class(recipe.task).from_config(config).save_pretrained(folder)
