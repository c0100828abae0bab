"""ScoringTrainer: trains on planned micro-batches, and evaluates with the task's metrics."""

from __future__ import annotations

from typing import Any

from hpcft.training.data.batch_order import BatchPlan, MicroBatchSampler
from hpcft.training.data.prepare import PreparedSplit
from hpcft.training.trainer.checkpointing import CheckpointingTrainer


class ScoringTrainer(CheckpointingTrainer):
    """Trains in hpcft's order of examples, and lets metrics look at the examples."""

    scored: PreparedSplit
    """The split that is evaluated now."""
    batch_plan: BatchPlan
    """Order of the training examples."""

    def _get_train_sampler(self, train_dataset: Any = None) -> MicroBatchSampler:
        return MicroBatchSampler(self.batch_plan, lambda: int(self.state.epoch or 0))

    def evaluate(self, eval_dataset: Any = None, **options: Any) -> dict[str, Any]:
        """Evaluates a split with the task's metrics; by default the validation split."""
        self.scored = eval_dataset if eval_dataset is not None else self.eval_dataset
        metrics: dict[str, Any] = super().evaluate(eval_dataset, **options)
        return metrics
