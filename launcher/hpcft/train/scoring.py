"""The Trainer that scores: its metrics know the examples of the split."""

from __future__ import annotations

from typing import Any

from hpcft.train.prepare import Split
from hpcft.train.stepping import SteppingTrainer


class ScoringTrainer(SteppingTrainer):
    """A Trainer whose metrics know the examples of the split that is being scored."""

    scored: Split

    def evaluate(self, eval_dataset: Any = None, **options: Any) -> dict[str, float]:
        """Scores a split with the task's metrics."""
        self.scored = eval_dataset if eval_dataset is not None else self.eval_dataset
        result: dict[str, float] = super().evaluate(eval_dataset, **options)
        return result
