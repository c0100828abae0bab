"""Chooses the interval between checkpoints, weighing the time of saves against lost steps."""

from __future__ import annotations

import math

NODE_MTBF_S = 1000 / 6.5 * 86_400
"""Mean time between failures of a node in seconds: 6.5 failures in a thousand node-days, on the
larger of two clusters of A100s (Kokolis et al. 2025, arXiv:2410.21680)."""
MAX_INTERVAL_S = 3600.0
"""Longest interval in seconds that `auto` chooses: jobs also end in ways that the failure rate of
nodes does not count."""


def checkpoint_interval_s(minutes: float | str, save_s: float, nodes: int) -> float:
    """Returns the seconds from one checkpoint to the next; infinity for no checkpoints.

    Args:
        minutes: `resources.checkpoint_min`: a number, 0 for none, or `auto`.
        save_s: seconds that a save takes.
        nodes: number of nodes, each of which may fail.
    """
    if isinstance(minutes, str):
        return min(optimal_interval_s(save_s, NODE_MTBF_S / nodes), MAX_INTERVAL_S)
    return 60 * minutes if minutes else math.inf


def optimal_interval_s(save_s: float, mtbf_s: float) -> float:
    """Returns the interval in seconds that loses the least time, after Daly.

    This is the higher-order estimate (Daly 2006, doi:10.1016/j.future.2004.11.016, equation 37) of
    Young's √(2 · save time · time between failures) (1974, doi:10.1145/361147.361115).

    Args:
        save_s: seconds that a save takes.
        mtbf_s: mean time between failures in seconds.
    """
    ratio = save_s / (2 * mtbf_s)
    if ratio >= 1:
        return mtbf_s
    return math.sqrt(2 * save_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_s
