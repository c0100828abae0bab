"""Perplexity is over tokens, and pretraining's accuracies are counted over tokens and pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hpcft.core.records import DataSpec
from hpcft.metrics import compute_metric, metric_values
from hpcft.tasks.pretraining import Pretraining


def test_perplexity_is_over_all_tokens_not_over_batches() -> None:
    """Three examples of 1, 2 and 5 tokens whose probabilities are known."""
    probabilities = [[0.5], [0.25, 0.125], [0.5, 0.5, 0.25, 1.0, 0.1]]
    losses = [-sum(map(math.log, tokens)) for tokens in probabilities]
    scores = compute_metric(
        "perplexity", predictions=losses, references=[1, 2, 5], loss="completion_loss"
    )
    product = math.prod(p for tokens in probabilities for p in tokens)
    assert scores["perplexity"] == pytest.approx(product ** (-1 / 8))
    assert scores["completion_loss"] == pytest.approx(-math.log(product) / 8)
    assert set(scores["intervals"]) == {"perplexity", "completion_loss"}

    reduced = np.array([[losses[i], tokens, 1, i % 2] for i, tokens in enumerate((1, 2, 5))])
    task = Pretraining(name="pretraining", data=DataSpec(files={"train": "x.jsonl"}))
    scores = task.compute_metrics(reduced.astype("float32"), None, [])
    assert scores["perplexity"] == pytest.approx(product ** (-1 / 8), rel=1e-6)
    assert scores["masked_loss"] == pytest.approx(-math.log(product) / 8, rel=1e-6)
    assert scores["masked_accuracy"] == 3 / 8
    assert scores["next_sentence_accuracy"] == pytest.approx(1 / 3)
    assert set(metric_values(scores)) == set(task.metric_names())
    assert set(scores["intervals"]) == {"perplexity", "masked_loss", "masked_accuracy",
                                        "next_sentence_accuracy"}  # fmt: skip
