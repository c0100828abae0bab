"""Feature extraction in the Trainer's place: hidden states from all ranks, then a regression.

Shapes: N examples, B of them at once, S tokens, H the model's width.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from hpcft.tasks.base import TrainedTask
from hpcft.training.data.prepare import PreparedSplit
from hpcft.training.trainer.trainer import ScoringTrainer


class FeatureTrainer(ScoringTrainer):
    """Trains and scores by extracting features; all ranks extract, and each fits the same."""

    def __init__(self, regression: dict[str, Any], task: TrainedTask, **options: Any) -> None:
        """Creates a trainer.

        Args:
            regression: options of scikit-learn's `LogisticRegression`.
            task: the classification.
            options: of the Trainer.
        """
        super().__init__(
            compute_loss_func=lambda outputs, labels, num_items_in_batch=None: torch.zeros(()),
            preprocess_logits_for_metrics=_first_token,
            **options,
        )
        self.regression = LogisticRegression(**regression)
        self.task = task

    def train(self, *_: Any, **__: Any) -> None:
        """Fits the regression to the training split."""
        features, labels = self._extracted(self.train_dataset)
        with warnings.catch_warnings():
            # In the log, not as an error: more iterations rarely change an answer.
            warnings.simplefilter("default", ConvergenceWarning)
            self.regression.fit(features, labels)

    def evaluate(
        self, eval_dataset: Any = None, metric_key_prefix: str = "eval", **_: Any
    ) -> dict[str, Any]:
        """Scores a split with the task's metrics."""
        features, labels = self._extracted(eval_dataset)
        outputs = self.task.head().outputs
        assert outputs is not None
        scores = np.full((len(features), outputs), -np.inf)  # of a label that was never seen
        scores[:, self.regression.classes_] = self.regression.predict_log_proba(features)
        metrics = self.task.metrics(scores, labels, eval_dataset.examples)
        return {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes coefficients, intercepts and the labels' indices as safetensors."""
        assert output_dir is not None
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            fitted = self.regression
            parts = {
                "coef": fitted.coef_,
                "intercept": fitted.intercept_,
                "classes": fitted.classes_,
            }
            save_file(
                {name: np.ascontiguousarray(part) for name, part in parts.items()},
                Path(output_dir) / "logistic_regression.safetensors",
            )

    def _extracted(self, split: PreparedSplit) -> tuple[Any, Any]:
        """Features (N, H) and labels (N,)."""
        found = self.predict(split)
        return np.asarray(found.predictions), np.asarray(found.label_ids)


def _first_token(outputs: Any, labels: Any) -> Any:
    """The last hidden state (B, S, H) of the first token as (B, H)."""
    hidden = outputs[0] if isinstance(outputs, tuple) else outputs
    return hidden[:, 0].float()
