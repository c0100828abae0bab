"""Computes the mean cross-entropy over tokens, and perplexity; lower is better for both.

The loss, whose name the caller chooses, is the cross-entropy (in nats) of all tokens divided by
their number, not a mean of means of batches or examples; `perplexity` is exp of it, from 1 up.
`intervals` holds their 95 % bootstrap intervals; whole examples are weighted, because the tokens
of one example are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpcft.metrics.base import Metric, MetricInfo, Scores
from hpcft.metrics.bootstrap import with_intervals

MAX_LOSS = 700.0  # exp of it is still a finite number


def compute_scores(predictions: Sequence[float], references: Sequence[float], loss: str) -> Scores:
    """Computes mean loss and perplexity.

    Args:
        predictions: summed loss of each example, in nats.
        references: number of tokens of each example.
        loss: name of the loss in the result.
    """
    import numpy as np

    losses, tokens = (np.asarray(c, dtype=np.float64) for c in (predictions, references))

    def values(weights: Any) -> dict[str, Any]:
        counted = weights @ tokens
        mean = np.divide(weights @ losses, counted, out=np.zeros(len(weights)), where=counted > 0)
        return {loss: mean, "perplexity": np.exp(mean.clip(max=MAX_LOSS))}

    return with_intervals(np.ones(len(losses)), values)


METRIC = Metric(
    infos={
        "loss": MetricInfo("cross-entropy that is trained on", False, "from 0"),
        "completion_loss": MetricInfo(
            "mean cross-entropy over the completions' tokens", False, "from 0"
        ),
        "perplexity": MetricInfo(
            "exp of the mean cross-entropy over all tokens, not over batches", False, "from 1"
        ),
    },
    inputs={"predictions": "float64", "references": "float64"},
    compute=compute_scores,
)
