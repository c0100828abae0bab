"""FeatureTrainer: extracts hidden states with all ranks, then fits a logistic regression.

Shapes: N examples, B examples of a batch, S tokens, H the model's width.
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
    """Extracts features with all ranks; each rank then fits the same regression."""

    def __init__(self, regression: dict[str, Any], task: TrainedTask, **options: Any) -> None:
        """Creates the Trainer.

        Args:
            regression: options of scikit-learn's `LogisticRegression`.
            task: the classification task.
            options: arguments of the Hugging Face Trainer.
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
        features, labels = self._extract(self.train_dataset)
        with warnings.catch_warnings():
            # It goes to the log and is no error: more iterations rarely change a prediction.
            warnings.simplefilter("default", ConvergenceWarning)
            self.regression.fit(features, labels)

    def evaluate(
        self, eval_dataset: Any = None, metric_key_prefix: str = "eval", **_: Any
    ) -> dict[str, Any]:
        """Evaluates a split with the task's metrics."""
        features, labels = self._extract(eval_dataset)
        outputs = self.task.head().outputs
        assert outputs is not None
        # A label that the training split does not have keeps the score of minus infinity.
        scores = np.full((len(features), outputs), -np.inf)
        scores[:, self.regression.classes_] = self.regression.predict_log_proba(features)
        metrics = self.task.compute_metrics(scores, labels, eval_dataset.examples)
        return {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the coefficients, intercepts and label indices as safetensors."""
        assert output_dir is not None
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            arrays = {
                "coef": self.regression.coef_,
                "intercept": self.regression.intercept_,
                "classes": self.regression.classes_,
            }
            save_file(
                {name: np.ascontiguousarray(array) for name, array in arrays.items()},
                Path(output_dir) / "logistic_regression.safetensors",
            )

    def _extract(self, split: PreparedSplit) -> tuple[Any, Any]:
        """Returns the features (N, H) and the labels (N,) of a split."""
        output = self.predict(split)
        return np.asarray(output.predictions), np.asarray(output.label_ids)


def _first_token(outputs: Any, labels: Any) -> Any:
    """Returns the last hidden state (B, S, H) of the first token as (B, H)."""
    hidden = outputs[0] if isinstance(outputs, tuple) else outputs
    return hidden[:, 0].float()
