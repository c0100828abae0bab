"""Tokenises a sample of the rows that are at hand, so that a plan knows how long they are."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import hpcft
from hpcft.config.recipe_types import FullRecipe
from hpcft.core.disk_cache import load_or_compute
from hpcft.core.errors import HpcftError
from hpcft.core.records import TokenizerTraining
from hpcft.planning.row_lengths import RowLengths
from hpcft.tasks.base import Example

SAMPLED_ROWS = 1000
TOKENIZER_SUFFIXES = (".json", ".txt", ".model")


def sample_lengths(local: FullRecipe, *, fixed: bool) -> RowLengths | None:
    """Returns the lengths of a sample of each split's rows; None where rows are not at hand.

    They are kept in the cache. Mistakes in data or tokenizer are left to their own checks.

    Args:
        local: a recipe without hub names.
        fixed: whether the data never change under their path, as those of a commit.
    """
    tokenizer, rows = _tokenizer_state(local), [] if fixed else _data_state(local)
    if tokenizer is None or rows is None:
        return None
    try:
        parts = [hpcft.__version__, SAMPLED_ROWS, local.task.model_dump(mode="json"), local.mode,
                 local.evaluation.split, local.train.seed, rows, tokenizer]  # fmt: skip
        return load_or_compute("lengths", json.dumps(parts), RowLengths, lambda: _sample(local))
    except (HpcftError, OSError, ValueError):
        return None


def _tokenizer_state(local: FullRecipe) -> object:
    """Returns what the tokenizer depends on; None if it is not on this machine."""
    source = local.model.tokenizer or local.model.path
    if isinstance(source, TokenizerTraining):
        return local.model.model_dump(mode="json")
    if source is None or not os.path.isabs(source) or not os.path.isdir(source):
        return None
    files = sorted(Path(source).glob("*.*"))
    return _file_states(file for file in files if file.suffix in TOKENIZER_SUFFIXES)


def _data_state(local: FullRecipe) -> object:
    """Returns what the rows depend on; None if they are not on this machine."""
    data = local.task.data
    if data.files is not None:
        return _file_states(map(Path, data.files.values()))
    if not os.path.isabs(data.path or ""):
        return None
    return _file_states(sorted(Path(data.path or "").rglob("*")))


def _file_states(files: Iterable[Path]) -> list[list[str | int]]:
    """Returns path, size and time of files, by which a change shows without reading them."""
    states = [(file, file.stat()) for file in files if file.is_file()]
    return [[str(file), state.st_size, state.st_mtime_ns] for file, state in states]


def _sample(local: FullRecipe) -> RowLengths:
    # Imported here, because a plan from the cache does without these libraries.
    from hpcft.tasks.data.examples import load_examples
    from hpcft.training.data.tokenizer import make_tokenizer

    splits = {name: _evenly(rows) for name, rows in load_examples(local.task).splits.items()}
    tokenizer = make_tokenizer(local, splits.get("train", []))
    if local.mode == "few_shot":
        return _of_prompts(local, splits, tokenizer)
    counts: dict[str, dict[int, int]] = {}
    for split, rows in splits.items():
        task = local.task.as_trained
        features = task.training_features if split == "train" else task.scoring_features
        inputs = [made for row in rows for made in features(row, tokenizer)]
        if inputs:
            counts[split] = dict(Counter(len(made["input_ids"]) for made in inputs))
    return RowLengths(counts=counts)


def _of_prompts(local: FullRecipe, splits: dict[str, list[Example]], tokenizer: Any) -> RowLengths:
    """Returns the tokens of each prompt that are its own: those of shared shots are run once."""
    from hpcft.tasks.few_shot.requests import common_prefix_length

    scored = local.evaluation.split
    prompts = local.few_shot_task.build_prompts(splits, scored, tokenizer, local.train.seed)
    lengths: Counter[int] = Counter()
    for shots in {prompt.shots for prompt in prompts}:
        requests = [prompt.request for prompt in prompts if prompt.shots == shots]
        shared = common_prefix_length(requests) if len(requests) > 1 else 0
        for request in requests:
            longest = max(map(len, request.choices), default=0)
            lengths[len(request.tokens) - shared + longest] += 1
    return RowLengths(counts={scored: dict(lengths)})


def _evenly(rows: Sequence[Example]) -> list[Example]:
    """Returns rows from all parts of a split: files are often sorted."""
    step = max(1, len(rows) // SAMPLED_ROWS)
    return list(rows[::step])[:SAMPLED_ROWS]
