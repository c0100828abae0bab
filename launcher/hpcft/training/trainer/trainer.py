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
    scored_mask: Any = None
    """Attention mask of the batch that is scored now, (B, S)."""

    def _get_train_sampler(self, train_dataset: Any = None) -> MicroBatchSampler:
        return MicroBatchSampler(self.batch_plan, lambda: int(self.state.epoch or 0))

    def evaluate(self, eval_dataset: Any = None, **options: Any) -> dict[str, Any]:
        """Evaluates a split with the task's metrics; by default the validation split."""
        self.scored = eval_dataset if eval_dataset is not None else self.eval_dataset
        metrics: dict[str, Any] = super().evaluate(eval_dataset, **options)
        return metrics

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], *rest: Any, **options: Any
    ) -> Any:
        """Scores a batch; its attention mask is kept for the task."""
        self.scored_mask = inputs.get("attention_mask")
        return super().prediction_step(model, inputs, *rest, **options)
