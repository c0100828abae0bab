"""Computes 95 % intervals by the Bayesian bootstrap: how far a metric moves with other examples.

Each of 1,000 to 10,000 draws gives the examples random weights, of the exponential distribution
(Rubin 1981, doi:10.1214/aos/1176345338); the interval goes from the 2.5th to the 97.5th percentile
of the weighted metric. The seed is fixed, so that the same examples give the same interval. The
spread between training seeds is not in it; repeated runs show that.

The usual bootstrap, which draws examples with replacement, never draws what the sample does not
have: without an error among 100 examples it says [1, 1], and near that it covers the truth in 66 %
of the cases. So two further examples get half a weight each, one of the lowest and one of the
highest value. For a share, such as accuracy, this is the Jeffreys interval, whose coverage Brown,
Cai and DasGupta 2001 (doi:10.1214/ss/1009213286) compare with others. Values that have no bounds
get wider percentiles instead, by Student's distribution (Hesterberg 2015,
doi:10.1080/00031305.2015.1089789). An interval always contains the metric's value.

Shapes: R draws, N examples, C kinds of equal examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

DRAWS = (1000, 10_000)
"""Smallest and largest number of draws: the fewer kinds of examples there are, the more."""
ENOUGH_WEIGHTS = 10_000_000
TAIL = 0.025
SEED = 0
MAX_WEIGHTS_AT_ONCE = 1_000_000  # bounds the memory: at most so many weights before they are used

Values = dict[str, Any]
"""Values (R,) by the name of the metric."""


def with_intervals(
    counts: Any, values: Callable[[Any], Values], added: Any = None
) -> dict[str, Any]:
    """Computes metrics over all examples and, as `intervals`, the interval of each.

    Args:
        counts: number of examples of each kind (C,); ones (N,) if each example is its own kind.
        values: computes the metrics (R,) from weights (R, C), which sum to 1 in each draw.
        added: further weight of each kind in the draws (C,), for the lowest and highest possible
            values; None if values have no bounds.
    """
    import numpy as np

    counts = np.asarray(counts, dtype=np.float64)
    shape = counts if added is None else counts + added
    generator = np.random.default_rng(SEED)
    at_once = max(1, MAX_WEIGHTS_AT_ONCE // len(counts))
    fewest, most = DRAWS
    draws = min(max(ENOUGH_WEIGHTS // len(counts), fewest), most)
    chunks = []
    for done in range(0, draws, at_once):
        # Weights of several examples of a kind are exponential each, together of a gamma
        # distribution; divided by their sum they are of a Dirichlet distribution.
        weights = generator.standard_gamma(shape, size=(min(at_once, draws - done), len(counts)))
        chunks.append(values(weights / weights.sum(1, keepdims=True)))
    scores = {name: float(v[0]) for name, v in values((counts / counts.sum())[None]).items()}
    tail = TAIL if added is not None else _wider_tail(counts.sum())
    intervals = {}
    for name, value in scores.items():
        drawn = np.concatenate([chunk[name] for chunk in chunks])
        low, high = np.quantile(drawn, (tail, 1 - tail)).tolist()
        intervals[name] = (min(low, value), max(high, value))
    return {**scores, "intervals": intervals}


def _wider_tail(examples: float) -> float:
    """Returns the share of draws beyond each end that gives a mean's interval by Student."""
    from scipy import stats  # type: ignore[import-untyped]

    if examples < 2:
        return 0.0
    t = stats.t.ppf(TAIL, examples - 1)
    return float(stats.norm.cdf(t * math.sqrt((examples + 1) / (examples - 1))))


def with_mean_intervals(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Computes the means of columns (N,) of values from 0 to 1, with their intervals."""
    import numpy as np

    table = np.array([*columns.values()], dtype=np.float64).T  # (N, number of columns)
    kinds, counts = np.unique(table, axis=0, return_counts=True)
    lowest, highest = np.zeros_like(table[:1]), np.ones_like(table[:1])
    kinds = np.concatenate([kinds, lowest, highest])
    counts = np.concatenate([counts, [0, 0]])
    added = np.concatenate([np.zeros(len(counts) - 2), [0.5, 0.5]])

    def values(weights: Any) -> Values:
        return dict(zip(columns, (weights @ kinds).T, strict=True))

    return with_intervals(counts, values, added)


def sums_by_label(weights: Any, labels: Any, number: int) -> Any:
    """Sums the weights of the examples of each label, (R, K).

    Args:
        weights: weights (R, C).
        labels: label of each kind of example (C,), from 0 to K - 1; K for one that is not counted.
        number: number of labels, K.
    """
    import numpy as np

    order = np.argsort(labels, kind="stable")
    present, starts = np.unique(np.asarray(labels)[order], return_index=True)
    sums = np.zeros((len(weights), number + 1))
    sums[:, present] = np.add.reduceat(weights[:, order], starts, axis=1)
    return sums[:, :number]
