"""Scores BERT's pretraining: guessed words and whether a text follows another.

Loss and perplexity over the masked tokens are those of `perplexity`; accuracies are shares from 0
to 1, higher is better. `intervals` holds the 95 % bootstrap intervals of all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hpcft.metrics import perplexity
from hpcft.metrics.base import Metric, MetricInfo, Scores, merge_scores
from hpcft.metrics.bootstrap import with_intervals, with_mean_intervals


def compute_scores(predictions: Sequence[Mapping[str, float]]) -> Scores:
    """Computes loss, perplexity and accuracy over masked tokens, and accuracy over pairs.

    Args:
        predictions: of each pair of texts the summed `loss` in nats, the number of masked `tokens`,
            of those guessed (`correct_tokens`), and 1 or 0 for the `correct_pair`.
    """
    losses, tokens, guessed, pairs = (
        [row[name] for row in predictions] for name in METRIC.inputs["predictions"]
    )
    return merge_scores(
        perplexity.compute_scores(losses, tokens, "masked_loss"),
        _masked_accuracy(guessed, tokens),
        with_mean_intervals({"next_sentence_accuracy": pairs}),
    )


def _masked_accuracy(guessed: Sequence[float], tokens: Sequence[float]) -> Scores:
    """Returns the share of the masked tokens that are guessed; whole examples are weighted."""
    import numpy as np

    mean = max(sum(tokens) / len(tokens), 1.0)
    table = np.array([[*guessed, 0.0, mean], [*tokens, mean, mean]])  # one none, one all guessed

    def values(weights: Any) -> dict[str, Any]:
        right, counted = (weights @ column for column in table)
        return {"masked_accuracy": right / np.where(counted > 0, counted, 1.0)}

    counts = np.array([*np.ones(len(tokens)), 0.0, 0.0])
    return with_intervals(counts, values, np.array([*np.zeros(len(tokens)), 0.5, 0.5]))


METRIC = Metric(
    infos={
        "masked_loss": MetricInfo("mean cross-entropy over the masked tokens", False, "from 0"),
        "perplexity": perplexity.METRIC.infos["perplexity"],
        "masked_accuracy": MetricInfo("share of the masked tokens that are guessed"),
        "next_sentence_accuracy": MetricInfo(
            "share of the pairs for which it is right whether the second text follows the first"
        ),
    },
    inputs={
        "predictions": {
            "loss": "float64", "tokens": "float64", "correct_tokens": "float64",
            "correct_pair": "float64",
        }
    },
    compute=compute_scores,
)  # fmt: skip
