"""Scores BERT's pretraining: guessed words and whether a text follows another.

Loss and perplexity over the masked tokens are those of `perplexity`; accuracies are shares from 0
to 1, higher is better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hpcft.metrics import perplexity
from hpcft.metrics.base import Metric, MetricInfo, Scores


def compute_scores(predictions: Sequence[Mapping[str, float]]) -> Scores:
    """Computes loss, perplexity and accuracy over masked tokens, and accuracy over pairs.

    Args:
        predictions: of each pair of texts the summed `loss` in nats, the number of masked `tokens`,
            of those guessed (`correct_tokens`), and 1 or 0 for the `correct_pair`.
    """
    losses, tokens, guessed, pairs = (
        [row[name] for row in predictions] for name in METRIC.inputs["predictions"]
    )
    return perplexity.compute_scores(losses, tokens, "masked_loss") | {
        "masked_accuracy": sum(guessed) / max(sum(tokens), 1.0),
        "next_sentence_accuracy": sum(pairs) / len(pairs),
    }


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
