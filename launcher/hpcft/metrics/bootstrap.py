"""Computes percentile bootstrap intervals: how far a metric would move with other examples.

As many examples as there are, are drawn with replacement 1,000 times; the interval goes from the
2.5th to the 97.5th percentile of the metric's values (Efron and Tibshirani 1993, chapter 13). The
seed is fixed, so that the same examples give the same interval. The interval does not cover the
spread between training seeds, which repeated runs show. `scipy.stats.bootstrap` does the same, but
calls a Python function for each resample; here a metric scores a block of resamples at once.

Shapes: R resamples, N examples, K labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

RESAMPLES = 1000
PERCENTILES = (2.5, 97.5)
SEED = 0
MAX_DRAWS_AT_ONCE = 1_000_000  # bounds the memory: at most so many examples before they are scored

Values = dict[str, Any]
"""Values (R,) by the name of the metric."""


def with_intervals(examples: int, values: Callable[[Any], Values]) -> dict[str, Any]:
    """Computes metrics over all examples and, as `intervals`, the interval of each.

    Args:
        examples: number of examples, N.
        values: computes the metrics (R,) of resamples, given as indices (R, N) of examples.
    """
    import numpy as np

    generator = np.random.default_rng(SEED)
    at_once = max(1, MAX_DRAWS_AT_ONCE // examples)
    chunks = [
        values(generator.integers(0, examples, size=(min(at_once, RESAMPLES - done), examples)))
        for done in range(0, RESAMPLES, at_once)
    ]
    scores = {name: float(v[0]) for name, v in values(np.arange(examples)[None]).items()}
    drawn = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in scores}
    intervals = {name: tuple(np.percentile(v, PERCENTILES).tolist()) for name, v in drawn.items()}
    return {**scores, "intervals": intervals}


def mean_values(columns: Mapping[str, Sequence[float]]) -> Callable[[Any], Values]:
    """Returns a function for `with_intervals` whose metrics are means of columns (N,)."""
    import numpy as np

    arrays = {name: np.asarray(column, dtype=np.float64) for name, column in columns.items()}
    return lambda drawn: {name: array[drawn].mean(axis=1) for name, array in arrays.items()}


def label_counts(labels: Any, drawn: Any, number: int) -> Any:
    """Counts how often each label occurs in each resample, (R, K).

    Args:
        labels: label of each example (N,), from 0 to K - 1; an example with label K is not counted.
        drawn: indices of the examples of each resample (R, N).
        number: number of labels, K.
    """
    import numpy as np

    resamples = len(drawn)
    offsets = labels[drawn] + np.arange(resamples)[:, None] * (number + 1)
    counts = np.bincount(offsets.ravel(), minlength=resamples * (number + 1))
    return counts.reshape(resamples, number + 1)[:, :number]
