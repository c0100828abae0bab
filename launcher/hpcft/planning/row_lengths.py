"""The lengths of the rows at hand, by which the time of a run is planned.

Memory is planned by `task.max_length`: any row may be that long. Time is decided by most rows.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from functools import cached_property
from itertools import accumulate

from hpcft.core.records import StoredRecord


class RowLengths(StoredRecord):
    """Histogram of the tokens of a sample of rows, by split."""

    counts: dict[str, dict[int, int]]
    """Number of sampled rows of each length in tokens, by split."""

    def mean(self, split: str) -> float:
        """Returns the mean length of a split's rows, in tokens."""
        counts = self.counts[split]
        return sum(length * count for length, count in counts.items()) / sum(counts.values())

    def quantile(self, split: str, share: float) -> int:
        """Returns the length that this share of a split's rows does not exceed, in tokens."""
        lengths, so_far = self._sorted[split]
        return lengths[min(bisect_left(so_far, share * so_far[-1]), len(lengths) - 1)]

    @cached_property
    def _sorted(self) -> dict[str, tuple[list[int], list[int]]]:
        """The lengths of each split in order, and how many rows are at most as long."""
        return {
            split: (sorted(counts), list(accumulate(counts[length] for length in sorted(counts))))
            for split, counts in self.counts.items()
        }

    @cached_property
    def _known_padding(self) -> dict[tuple[str, int, int], float]:
        """Results of `padded`: many layouts ask for the same."""
        return {}

    def expected_longest(self, split: str, rows: int) -> float:
        """Returns the mean length of the longest of so many rows: the sum of P(longest > x)."""
        counts = self.counts[split]
        total, seen, before, longest = sum(counts.values()), 0, 0, 0.0
        for length in sorted(counts):
            longest += (length - before) * (1 - (seen / total) ** rows)
            seen, before = seen + counts[length], length
        return longest

    def padded(self, split: str, rows: int, batches: int = 1) -> float:
        """Returns the mean length that batches are padded to, which share out sorted rows.

        The longest of all is exact. Others, the k-th smallest of n, lie at about the k/(n+1)
        quantile (David and Nagaraja 2003, Order Statistics, section 4.6).

        Args:
            split: the split.
            rows: rows of each batch.
            batches: number of batches over which the rows of a step are sorted.
        """
        key = split, rows, batches
        if key not in self._known_padding:
            self._known_padding[key] = self._padded(split, rows, batches)
        return self._known_padding[key]

    def _padded(self, split: str, rows: int, batches: int) -> float:
        total = rows * batches
        ends = range(rows, total, rows)
        # Of many batches some are looked at.
        ends = ends[:: math.ceil(len(ends) / 50) or 1]
        lengths = [self.quantile(split, end / (total + 1)) for end in ends]
        others = sum(lengths) / len(lengths) * (batches - 1) if lengths else 0.0
        return (others + self.expected_longest(split, total)) / batches

    def describe(self, split: str) -> str:
        """Returns the lengths in words: `480 rows of train: 30 tokens on average, 47 at most`."""
        counts = self.counts[split]
        return (
            f"{sum(counts.values()):,} rows of {split}: {self.mean(split):.0f} tokens on average, "
            f"{max(counts):,} at most"
        )
