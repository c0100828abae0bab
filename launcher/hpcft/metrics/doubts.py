"""Finds reasons to doubt a result: a loss that rose, a score below that of a constant answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

LAST = 5
"""Number of losses at the end whose median is compared with the first one; at most half of all."""
RISE_FACTOR, RISE = 2.0, 0.5
"""How much the loss at the end has to be above the one at the start, as a factor and in nats."""


def find_doubts(losses: Sequence[float], metrics: Mapping[str, float], examples: int) -> list[str]:
    """Returns a sentence for each reason to doubt a result.

    Args:
        losses: the logged training losses, in order.
        metrics: value of each metric.
        examples: number of scored examples.
    """
    return [*_diverged(losses), *_below_majority(metrics, examples)]


def _diverged(losses: Sequence[float]) -> list[str]:
    if len(losses) < 2:
        return []
    # A training that diverges often does so within its first steps.
    first, last = losses[0], median(losses[-min(LAST, len(losses) // 2) :])
    if last <= RISE_FACTOR * first or last <= first + RISE:
        return []
    return [
        f"the training diverged: its loss rose from {first:.4g} to {last:.4g}; lower "
        "train.learning_rate, or raise train.warmup_steps"
    ]


def _below_majority(metrics: Mapping[str, float], examples: int) -> list[str]:
    accuracy, majority = metrics.get("accuracy"), metrics.get("majority")
    if accuracy is None or majority is None or examples < 1:
        return []
    # By chance a classifier that has learnt the share only may be a little below it.
    chance = 1.96 * math.sqrt(majority * (1 - majority) / examples)
    if accuracy >= majority - chance:
        return []
    return [
        f"accuracy {accuracy:.4f} is below {majority:.4f}, the share of the most frequent label: "
        "always answering that one would score more"
    ]
