"""How far a metric would move with other examples of the same kind: the percentile bootstrap.

The examples are drawn anew, as many as there are, with repeats, 1,000 times; the interval goes from
the 2.5th to the 97.5th percentile of the metric's values (Efron and Tibshirani 1993, chapter 13).
It is by a fixed seed: the same examples give the same interval. It says nothing of what another
seed of the training would give, which repeats of a run show.

Shapes: R resamples, N examples, K labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

RESAMPLES = 1000
PERCENTILES = (2.5, 97.5)
SEED = 0
DRAWS_AT_ONCE = 1_000_000  # examples drawn before they are scored: bounds the memory

Values = dict[str, Any]
"""Name of a metric to its values (R,)."""


def with_intervals(examples: int, values: Callable[[Any], Values]) -> dict[str, Any]:
    """The metrics of all examples; as `intervals`, the lowest and highest likely value of each.

    Args:
        examples: how many there are, N.
        values: the metrics (R,) of resamples, which are indices (R, N) of examples.
    """
    import numpy as np

    draw = np.random.default_rng(SEED)
    at_once = max(1, DRAWS_AT_ONCE // examples)
    chunks = [
        values(draw.integers(0, examples, size=(min(at_once, RESAMPLES - done), examples)))
        for done in range(0, RESAMPLES, at_once)
    ]
    result = {name: float(v[0]) for name, v in values(np.arange(examples)[None]).items()}
    drawn = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in result}
    intervals = {name: tuple(np.percentile(v, PERCENTILES).tolist()) for name, v in drawn.items()}
    return {**result, "intervals": intervals}


def mean_values(columns: Mapping[str, Sequence[float]]) -> Callable[[Any], Values]:
    """Metrics that are means of a value (N,) of each example, for `with_intervals`."""
    import numpy as np

    arrays = {name: np.asarray(column, dtype=np.float64) for name, column in columns.items()}
    return lambda drawn: {name: array[drawn].mean(axis=1) for name, array in arrays.items()}


def label_counts(labels: Any, drawn: Any, number: int) -> Any:
    """How often each label comes in each resample, (R, K); labels are (N,), from 0 to K - 1.

    An example whose label is K counts for none.
    """
    import numpy as np

    resamples = len(drawn)
    places = labels[drawn] + np.arange(resamples)[:, None] * (number + 1)
    counts = np.bincount(places.ravel(), minlength=resamples * (number + 1))
    return counts.reshape(resamples, number + 1)[:, :number]
