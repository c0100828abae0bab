"""What rank 0 makes once for all ranks: tokenizer, features, and the weights of a new model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
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
from hpcft.core.records import Fingerprints, StoredRecord, TokenizerTraining
from hpcft.staging import staged_inputs
from hpcft.staging.verify import load_tokenizer as load_pretrained_tokenizer
from hpcft.tasks.base import INPUTS, Example, ModelInputs, TrainedTask
from hpcft.tasks.data.examples import load_examples
from hpcft.training.context import WorkerContext
from hpcft.training.data import few_shot_prompts
from hpcft.training.data.tokenizer import train_tokenizer
from hpcft.training.distributed import rank_env, rendezvous, torch_extensions


class DataSummary(StoredRecord):
    """What was prepared; written last."""

    examples: dict[str, int]
    """Examples of each split."""
    tokens: dict[str, int]
    """Tokens of each split, padding left out."""
    notes: list[str]
    """What the reader of the result should know."""


class PreparedSplit:
    """Features of a split for the Trainer, with the examples that its metrics need."""

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
        import pyarrow.compute

        column = self.features.data.column("input_ids")
        counted: list[int] = pyarrow.compute.list_value_length(column).to_pylist()
        return counted

    def rows(self, indices: Sequence[int]) -> list[ModelInputs]:
        """Several rows, read at once."""
        found: list[ModelInputs] = self.features.__getitems__(list(indices))
        return found


def prepare_all_ranks(context: WorkerContext) -> DataSummary:
    """Has rank 0 prepare the data, then lets all ranks meet; returns what was prepared."""
    plan, reporter, index = context.plan, context.reporter, context.restart_index
    if index:  # from here on, metrics.jsonl begins again or continues from a checkpoint
        last = context.run.read_recoveries()[-1]
        what = {"number": last.number, "change": last.change, "action": last.action}
        reporter.log("recovery", what)
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
    """Writes `prepared/`; what an earlier attempt finished is kept."""
    done = paths.prepared / "summary.json"
    if done.exists():
        return
    _check_unchanged(paths)
    shutil.rmtree(paths.prepared, ignore_errors=True)
    paths.prepared.mkdir(mode=0o700)
    examples = load_examples(recipe.task)
    notes = list(examples.notes)
    tokenizer = _tokenizer(recipe, examples.splits.get("train", []))
    tokenizer.save_pretrained(paths.prepared / "tokenizer")
    if recipe.mode == "few_shot":
        tokens = few_shot_prompts.write_prompts(
            paths, recipe, recipe.task.as_few_shot, examples.splits, tokenizer, notes
        )
    else:
        tokens = _features(paths, recipe.task.as_trained, examples.splits, tokenizer, notes)
    if recipe.model.path is None:
        _new_weights(recipe, tokenizer, paths.prepared / "model")
    counts = {split: len(found) for split, found in examples.splits.items()}
    write_record(done, DataSummary(examples=counts, tokens=tokens, notes=notes))


def _features(
    paths: RunPaths,
    task: TrainedTask,
    splits: dict[str, list[Example]],
    tokenizer: Any,
    notes: list[str],
) -> dict[str, int]:
    """Writes the features of every split; the tokens of each."""
    tokens = {}
    for split, found in splits.items():
        features_of = task.training_features if split == "train" else task.scoring_features
        kept, features = [], []
        for example in found:
            made = features_of(example, tokenizer)
            beside = [{k: v for k, v in row.items() if k not in INPUTS} for row in made]
            kept.append({**example, "rows": beside} if any(beside) else example)
            features += [{k: v for k, v in row.items() if k in INPUTS} for row in made]
        cut = sum(len(row["input_ids"]) >= task.max_length for row in features)
        if cut and task.cuts_texts:
            notes.append(f"{split}: {cut} of {len(features)} texts reach max_length and may be cut")
        tokens[split] = sum(len(row["input_ids"]) for row in features)
        datasets.Dataset.from_list(features).save_to_disk(paths.prepared / split)
        (paths.prepared / f"{split}.json").write_text(json.dumps(kept, ensure_ascii=False))
    return tokens


def load_split(paths: RunPaths, split: str) -> PreparedSplit | None:
    """A prepared split, memory-mapped; None where the data has no such split."""
    folder = paths.prepared / split
    if not folder.is_dir():
        return None
    examples = json.loads((paths.prepared / f"{split}.json").read_text())
    return PreparedSplit(datasets.Dataset.load_from_disk(folder), examples)


def load_tokenizer(paths: RunPaths) -> Any:
    """The run's tokenizer."""
    return AutoTokenizer.from_pretrained(paths.prepared / "tokenizer")


def _check_unchanged(paths: RunPaths) -> None:
    staged_inputs.check_staged_of_run(paths)
    submitted = read_record(paths.fingerprints, Fingerprints).files
    for key, value in identity.compute_fingerprints(read_record(paths.recipe, FullRecipe)).items():
        if submitted.get(key) not in (None, value):
            raise DataError(f"{key}: the files have changed since the run was submitted")


def _tokenizer(recipe: FullRecipe, train: list[Example]) -> Any:
    wanted = recipe.model.tokenizer
    if isinstance(wanted, TokenizerTraining):
        texts = [text for example in train for text in recipe.task.texts(example)]
        config = build_model_config(recipe.model, recipe.task)
        tokenizer = train_tokenizer(
            wanted,
            texts,
            causal=recipe.task.causal,
            mask=recipe.task.masks,
            segments=getattr(config, "type_vocab_size", 1) > 1,
        )
        tokenizer.model_max_length = recipe.task.max_length
    else:
        source = wanted or recipe.model.path
        assert source is not None  # a recipe without either is refused
        tokenizer = load_pretrained_tokenizer(source)
    if tokenizer.pad_token_id is None:
        # Harmless: padding is masked by position, and labels of real end tokens are kept.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def _new_weights(recipe: FullRecipe, tokenizer: Any, folder: Path) -> None:
    """Initial weights from the recipe's seed, on a file: the same for any number of ranks.

    Under `zero.Init` one seed gives other weights for each number of ranks.
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
