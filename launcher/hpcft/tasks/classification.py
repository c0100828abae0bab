"""Classification of a text or a pair of texts (IMDB, SST-2, MultiNLI)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from hpcft.core.records.base import ColumnName, OneLine
from hpcft.metrics import Scores, classification_names, compute_metric
from hpcft.tasks.base import (
    Example,
    Head,
    ModelInputs,
    TrainedTask,
    label_index,
    summed_cross_entropy,
    text_of,
    unique,
)


class Classification(TrainedTask):
    """Give each text, or pair of texts, one of a fixed set of labels."""

    name: Literal["classification"]
    """`classification`."""
    text: ColumnName = "text"
    """Column of the text (of a pair: the first, the premise)."""
    text_pair: ColumnName | None = None
    """Column of the second text (the hypothesis)."""
    label: ColumnName = "label"
    """Column of the label: one of `labels`, or its index."""
    labels: Annotated[list[OneLine], Field(min_length=2, max_length=10_000), AfterValidator(unique)]
    """The labels in the order of the model's outputs; of two, the second is the positive class."""

    def columns(self) -> list[str]:
        """Columns that every row has to have."""
        pair = [self.text_pair] if self.text_pair else []
        return [self.text, *pair, self.label]

    def example(self, row: Mapping[str, Any]) -> Example:
        """`text`, `text_pair` (or None) and `label` as an index."""
        pair = text_of(row, self.text_pair) if self.text_pair else None
        text = text_of(row, self.text)
        label = label_index(row, self.label, self.labels)
        return {"text": text, "text_pair": pair, "label": label}

    def texts(self, example: Example) -> list[str]:
        """The text, and the second one of a pair."""
        return [text for text in (example["text"], example["text_pair"]) if text is not None]

    def head(self) -> Head:
        """A linear layer with one output a label."""
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
        """Token ids, cut at `max_length`, and the label's index."""
        encoded = tokenizer(
            example["text"], example["text_pair"], truncation=True, max_length=self.max_length
        )
        return [{**encoded, "labels": example["label"]}]

    def scoring_features(self, example: Example, tokenizer: Any) -> list[ModelInputs]:
        """The same as for training."""
        return self.training_features(example, tokenizer)

    def loss(self, logits: Any, labels: Any, items: Any, smoothing: float) -> Any:
        """Cross-entropy of logits (B, C) against label indices (B,)."""
        return summed_cross_entropy(logits, labels, items, smoothing)

    def reduce_logits(self, logits: Any, labels: Any) -> Any:
        """Logits (B, C) are small: kept as they are."""
        return (logits[0] if isinstance(logits, tuple) else logits).float()

    def metric_names(self) -> list[str]:
        """Those of `metrics/classification`."""
        return classification_names(self.labels)

    def metrics(self, reduced: Any, labels: Any, examples: Sequence[Example]) -> Scores:
        """Accuracy, precision, recall and F1 as in `metrics/classification`."""
        return compute_metric(
            "classification",
            predictions=reduced.argmax(axis=-1).tolist(),
            references=labels.tolist(),
            labels=self.labels,
        )
