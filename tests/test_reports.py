"""Runs every shipped recipe to its end on a real Slurm, in the nightly tier.

Overrides give each recipe a tiny random model of the same architecture, and local data with the
same columns. The recipes are submitted by the command line all at once; a table shows their
results.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpcft.config.recipe import list_recipes, load_recipe
from tiny_reports import DATA, data_files, model_folder, source_of

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

NAMES = [file.stem for file in list_recipes() if file.stem != "quickstart"]

# A model with random weights needs larger steps than a pretrained one.
RANDOM_MODEL = (
    "train.learning_rate=2e-3",
    "train.warmup_steps=0.1",
    "train.num_train_epochs=4",
    "train.max_steps=-1",
    "train.global_batch_size=16",
    "train.logging_steps=5",
)
OVERRIDES: dict[str, tuple[str, ...]] = {
    # The large models need several nodes.
    "gemma7b_full": ("resources.nodes=2", "resources.gpus_per_node=2",
                     "train.num_train_epochs=1", "task.max_length=256"),
    "llama3_8b_winogrande_full": ("resources.nodes=2", "resources.gpus_per_node=1",
                                  "train.num_train_epochs=1"),
    "gemma2b_full": ("resources.gpus_per_node=2", "task.max_length=256"),
    "bert_wikitext2_pretrain": ("train.num_train_epochs=2", "task.max_length=128"),
}  # fmt: skip
MIN_ACCURACY = {"distilbert_imdb": 0.9, "distilbert_imdb_trainer": 0.9, "bert_sst2": 0.9,
         "roberta_mnli_full": 0.9, "llama3_8b_mnli_qlora": 0.9}  # fmt: skip


def hpcft(*arguments: object) -> str:
    """Runs an hpcft command in its own process; returns its output."""
    command = [sys.executable, "-m", "hpcft", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tiny_overrides(name: str, folder: Path) -> list[str]:
    """Returns overrides that give a recipe a tiny model and local data."""
    recipe = load_recipe(name)[0].recipe
    files = data_files(recipe, folder / "data")
    texts = (value for path in (folder / "data").rglob("*.jsonl")
             for row in path.read_text().splitlines()
             for value in json.loads(row).values() if isinstance(value, str))  # fmt: skip
    model = model_folder(recipe, folder / "models", texts)
    settings = [
        f"task.data.files={json.dumps({split: str(file) for split, file in files.items()})}",
        "task.data.path=null",
        "task.data.name=null",
        *(() if recipe.method.name == "frozen" else RANDOM_MODEL),
        *OVERRIDES.get(name, ()),
    ]
    if recipe.task.data.limits:
        settings.append("task.data.limits={train: 300, validation: 40, test: 80}")
    if recipe.task.data.sample:
        settings.append("task.data.sample={train: 1}")
    if recipe.model.path is None:
        settings += [f"model.tokenizer={model}"]
        saved = json.loads((model / "config.json").read_text())
        sizes = [key for key in recipe.model.config or {} if isinstance(saved[key], int)]
        settings += [f"model.config.{key}={saved[key]}" for key in sizes]
    else:
        settings += [f"model.path={model}", "model.config=null", "model.tokenizer=null"]
    return [part for setting in settings for part in ("-o", setting)]


@pytest.fixture(scope="module")
def table(testbed: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Runs all recipes; the rows of the results table, by recipe."""
    folder = tmp_path_factory.mktemp("reports")
    before = Path.cwd()
    os.chdir(folder)
    for name in NAMES:  # The tokenizers are trained on all texts, so that all have to be there.
        data_files(load_recipe(name)[0].recipe, folder / "data")
    try:
        for name in NAMES:
            hpcft("submit", name, *tiny_overrides(name, folder))
        hpcft("status", "--watch")
        rows = json.loads(hpcft("collect", "--json"))
        (folder / "table.md").write_text(hpcft("collect", "--format", "md"))
        yield {row["recipe"]: row for row in rows}
    finally:
        os.chdir(before)


def test_tiny_data_exists_for_every_shipped_recipe() -> None:
    assert len(NAMES) == 22
    assert {source_of(load_recipe(name)[0].recipe) for name in NAMES} <= set(DATA)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_completes_with_metrics(table: dict[str, Any], name: str) -> None:
    row = table[name]
    assert row["state"] == "COMPLETED"
    assert row["metrics"]
    baseline = load_recipe(name)[0].recipe.baseline
    if baseline is not None:
        assert row["baseline_source"] == baseline.source


@pytest.mark.parametrize("name", MIN_ACCURACY)
def test_recipe_learns_the_grammar(table: dict[str, Any], name: str) -> None:
    metrics = table[name]["metrics"]
    assert metrics["accuracy"]["mean"] > max(MIN_ACCURACY[name], metrics["majority"]["mean"])
