"""Checks the model inputs of classification."""

from __future__ import annotations

from typing import Any

from hpcft.tasks.classification import Classification


def test_training_features_cuts_tokens_at_max_length(tokenizer: Any) -> None:
    fields = {"name": "classification", "labels": ["bad", "good"], "data": {"path": "x/y"}}
    task = Classification.model_validate(fields | {"max_length": 8})
    example = {"text": "how many legs " * 50, "text_pair": None, "label": 1}
    (features,) = task.training_features(example, tokenizer)
    assert (len(features["input_ids"]), features["labels"]) == (8, 1)
