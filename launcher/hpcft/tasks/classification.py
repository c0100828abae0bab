"""Classifies a text or a pair of texts (IMDB, SST-2, MultiNLI)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from hpcft.core.records.base import ColumnName, OneLine
from hpcft.metrics import compute_metric
from hpcft.metrics.base import Scores
from hpcft.metrics.classification import classification_names
from hpcft.tasks.base import (
    Example,
    Head,
    ModelInputs,
    TrainedTask,
    column_text,
    summed_cross_entropy,
    unique,
)
from hpcft.tasks.labels import label_index


class Classification(TrainedTask):
    """Gives each text, or pair of texts, one of a fixed set of labels."""

    name: Literal["classification"]
    """`classification`."""
    text: ColumnName = "text"
    """Column of the text (of a pair: the first, the premise)."""
    text_pair: ColumnName | None = None
    """Column of the second text (the hypothesis)."""
    label: ColumnName = "label"
    """Column of the label: one of `labels`, its index from 0, or a class that the data name."""
    labels: Annotated[list[OneLine], Field(min_length=2, max_length=10_000), AfterValidator(unique)]
    """Labels in the order of the model's outputs; of two, the second is the positive class."""

    def columns(self) -> list[str]:
        """Returns the columns of the texts and of the label."""
        pair = [self.text_pair] if self.text_pair else []
        return [self.text, *pair, self.label]

    def parse_row(self, row: Mapping[str, Any]) -> Example:
        """Returns `text`, `text_pair` (or None) and `label` as an index."""
        pair = column_text(row, self.text_pair) if self.text_pair else None
        text = column_text(row, self.text)
        label = label_index(row, self.label, self.labels)
        return {"text": text, "text_pair": pair, "label": label}

    def tokenizer_texts(self, example: Example) -> list[str]:
        """Returns the text, and the second one of a pair."""
        return [text for text in (example["text"], example["text_pair"]) if text is not None]

    def head(self) -> Head:
        """Returns a linear layer with one output per label."""
        return Head(
            "AutoModelForSequenceClassification",
            {
                "num_labels": len(self.labels),
                "id2label": dict(enumerate(self.labels)),
                "label2id": {label: index for index, label in enumerate(self.labels)},
                "problem_type": "single_label_classification",
            },
            outputs=len(self.labels),
        )

    def training_features(self, example: Example, tokenizer: Any) -> list[ModelInputs]:
        """Returns token ids, cut at `max_length`, and the label's index."""
        encoded = tokenizer(
            example["text"], example["text_pair"], truncation=True, max_length=self.max_length
        )
        return [{**encoded, "labels": example["label"]}]

    def scoring_features(self, example: Example, tokenizer: Any) -> list[ModelInputs]:
        """Returns the same rows as for training."""
        return self.training_features(example, tokenizer)

    def loss(self, logits: Any, labels: Any, items: Any, smoothing: float) -> Any:
        """Computes the cross-entropy of logits (B, C) against label indices (B,)."""
        return summed_cross_entropy(logits, labels, items, smoothing)

    def reduce_logits(self, logits: Any, labels: Any) -> Any:
        """Returns the logits (B, C) in fp32; they are small already."""
        return (logits[0] if isinstance(logits, tuple) else logits).float()

    def metric_names(self) -> list[str]:
        """Returns the names of `metrics/classification`."""
        return classification_names(self.labels)

    def compute_metrics(self, reduced: Any, labels: Any, examples: Sequence[Example]) -> Scores:
        """Computes accuracy, precision, recall and F1 with `metrics/classification`."""
        return compute_metric(
            "classification",
            predictions=reduced.argmax(axis=-1).tolist(),
            references=labels.tolist(),
            labels=self.labels,
        )
