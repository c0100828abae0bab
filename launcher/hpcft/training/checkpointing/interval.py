"""How often a run is saved, so that saving and doing lost steps again take least time together."""

from __future__ import annotations

import math

NODE_FAILS_S = 1000 / 6.5 * 86_400
"""Mean time between failures of a node: 6.5 in a thousand node-days on the larger of two clusters
of A100s (Kokolis et al. 2025, arXiv:2410.21680)."""
MOST_S = 3600.0
"""Never more is lost than an hour: jobs also end in ways that no statistics of nodes tell of."""


def interval_s(minutes: float | str, save_s: float, nodes: int) -> float:
    """Seconds from one checkpoint to the next; infinite where there are to be none.

    Args:
        minutes: `resources.checkpoint_min`: a number, 0 for none, or `auto`.
        save_s: seconds that a save takes.
        nodes: nodes of the run, any of which may fail.
    """
    if isinstance(minutes, str):
        return min(best_s(save_s, NODE_FAILS_S / nodes), MOST_S)
    return 60 * minutes if minutes else math.inf


def best_s(save_s: float, fails_s: float) -> float:
    """The interval that loses least time, after Daly.

    A higher-order estimate (Daly 2006, doi:10.1016/j.future.2004.11.016, equation 37) of what Young
    gave as √(2 · save · time between failures) (1974, doi:10.1145/361147.361115).

    Args:
        save_s: seconds that a save takes.
        fails_s: mean time between failures in seconds.
    """
    share = save_s / (2 * fails_s)
    if share >= 1:
        return fails_s
    return math.sqrt(2 * save_s * fails_s) * (1 + math.sqrt(share) / 3 + share / 9) - save_s
