"""The Trainer that scores: its metrics know the examples of the split."""

from __future__ import annotations

from typing import Any

from hpcft.training.data.batch_order import BatchPlan, MicroBatches
from hpcft.training.data.prepare import PreparedSplit
from hpcft.training.trainer.checkpointing import CheckpointingTrainer


class ScoringTrainer(CheckpointingTrainer):
    """A Trainer that takes examples in our order, and whose metrics know those of a split."""

    scored: PreparedSplit
    order: BatchPlan

    def _get_train_sampler(self, train_dataset: Any = None) -> MicroBatches:
        return MicroBatches(self.order, lambda: int(self.state.epoch or 0))

    def evaluate(self, eval_dataset: Any = None, **options: Any) -> dict[str, Any]:
        """Scores a split with the task's metrics."""
        self.scored = eval_dataset if eval_dataset is not None else self.eval_dataset
        result: dict[str, Any] = super().evaluate(eval_dataset, **options)
        return result
