"""Tests that a model whose saved weights do not fit the recipe is refused before it is queued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from builders import bert_folder, recipe
from hpcft.core.errors import DataError
from hpcft.core.records import ModelFacts
from hpcft.planning import model_facts

DATA = {"path": "x/y"}
QUESTIONS = {"name": "question_answering", "data": DATA}


def facts_of(folder: Path, task: dict[str, Any], method: str = "full") -> ModelFacts:
    made = recipe(model={"path": str(folder)}, task=task, method={"name": method})
    return model_facts.compute_model_facts(made.model, made.task, made.method)


def labels(number: int) -> dict[str, Any]:
    return {"name": "classification", "labels": [f"l{i}" for i in range(number)], "data": DATA}


@pytest.mark.parametrize("method", ["full", "lora", "head_only", "features"])
def test_a_head_for_another_number_of_labels_is_refused(method: str, workplace: Path) -> None:
    """Loaded, it would end the job: transformers refuses the shapes of the head."""
    folder = bert_folder(workplace / "trained")
    with pytest.raises(DataError, match="has a head for 2 labels, the task has 3") as refused:
        facts_of(folder, labels(3), method)
    assert "classifier.weight" in str(refused.value) or "classifier.bias" in str(refused.value)
    assert "save_pretrained" in str(refused.value)


def test_models_that_fit_are_accepted(workplace: Path) -> None:
    """A head for the same labels, none at all, or one that the task does not use."""
    assert facts_of(bert_folder(workplace / "trained"), labels(2))
    assert facts_of(bert_folder(workplace / "bare", head=False), labels(3))
    assert facts_of(workplace / "trained", QUESTIONS)


def test_an_adapter_in_the_place_of_a_model_is_refused(workplace: Path) -> None:
    """Its folder has a configuration, too, and links to the base model's weights."""
    folder = bert_folder(workplace / "trained")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(DataError, match="holds an adapter; set"):
        facts_of(folder, labels(2))


def test_weights_of_another_model_than_the_configuration_are_refused(workplace: Path) -> None:
    folder = bert_folder(workplace / "trained")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with pytest.raises(DataError, match="not of the model that its config"):
        facts_of(folder, labels(2))
