"""Mean cross-entropy over tokens, and perplexity: lower is better."""

import datasets
import evaluate
import numpy as np

from hpcft.metrics.bootstrap import with_intervals

_DESCRIPTION = """\
The loss, which is called as `loss` says, is the cross-entropy (in nats) of all tokens over their
number, not a mean of means of batches or examples; `perplexity` is exp of it, from 1 up. Lower is
better for both. `intervals` holds their 95 % bootstrap intervals; what is drawn are examples,
whole, because the tokens of one do not come independently.
"""

HIGHEST_LOSS = 700.0  # exp of it is still a number


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION)
class Perplexity(evaluate.Metric):  # type: ignore[misc]
    """Mean over tokens of examples whose losses and numbers of tokens are known."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description="predictions: summed loss of an example; references: its tokens",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions, references, loss):  # type: ignore[no-untyped-def]
        losses, tokens = (np.asarray(c, dtype=np.float64) for c in (predictions, references))

        def values(drawn):  # type: ignore[no-untyped-def]
            mean = losses[drawn].sum(1) / tokens[drawn].sum(1).clip(min=1.0)
            return {loss: mean, "perplexity": np.exp(mean.clip(max=HIGHEST_LOSS))}

        return with_intervals(len(losses), values)
