"""Defines what a task is: its columns, model head, inputs, loss and metrics."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from hpcft.core.errors import DataError, InputError, Problem
from hpcft.core.records import Task
from hpcft.metrics.base import Scores

Example = dict[str, Any]
"""Checked content of a row; its keys are the task's own."""
ModelInputs = dict[str, Any]
"""One row of model inputs: token ids, labels, and whatever the metrics need beside them."""

IGNORE_INDEX = -100  # the label that PyTorch's cross-entropy leaves out
# Keys of ModelInputs that go to the model; the others are kept for the metrics.
INPUT_KEYS = ("input_ids", "attention_mask", "token_type_ids", "labels")
MAX_PROBLEMS = 10  # bad rows that an error lists; the others are counted

Mode = Literal["finetune", "evaluate", "few_shot"]
"""Kind of a run: training and scoring, scoring a finished model, or prompting a model."""


class BadRow(Exception):
    """Reports a row that the task cannot use."""

    def __init__(
        self,
        column: str,
        what: str,
        fix: str = "",
        *,
        is_empty: bool = False,
        is_in_every_row: bool = False,
    ) -> None:
        """Creates the error.

        Args:
            column: name of the column.
            what: what is wrong with it.
            fix: what to do about it.
            is_empty: whether its text is empty, so that `drop_empty` may leave the row out.
            is_in_every_row: whether the other rows of the split need not be looked at.
        """
        super().__init__(what)
        self.problem = Problem("", column, what, fix)
        self.is_empty = is_empty
        self.is_in_every_row = is_in_every_row


@dataclass(frozen=True)
class Head:
    """Describes the output layer that a task puts on the model."""

    auto_class: str
    """Name of the `transformers` Auto class."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the model's configuration that the head needs (`num_labels`, `id2label`)."""
    outputs: int | None = None
    """Number of outputs per position; None: the size of the vocabulary."""
    module: str | None = None
    """Module that the model must have, where the Auto class makes some models without it."""


class TaskBase(Task):
    """Adds a task's behaviour to its recipe fields.

    A row of the data becomes a checked Example, and an Example becomes ModelInputs.
    """

    causal: ClassVar[bool] = False
    """Whether the model reads from left to right; decides the PEFT task type."""
    labels_per_token: ClassVar[bool] = False
    """Whether there is a label for each token, padded together with the tokens."""
    needs_mask_token: ClassVar[bool] = False
    """Whether the tokenizer needs a mask token."""
    keeps_locations: ClassVar[bool] = False
    """Whether an example holds the file and line of its row, under `place`."""

    def mode(self, *, trains: bool) -> Mode:
        """Returns what a run of this task does.

        Args:
            trains: whether the recipe's method trains anything.
        """
        return "finetune" if trains else "evaluate"

    @property
    def rows_per_example(self) -> int:
        """Number of model input rows that score one example."""
        return 1

    def rows_per_batch(self, windows: int) -> int:
        """Returns how many rows one forward pass scores.

        Args:
            windows: number of rows of `max_length` tokens that a batch has room for.
        """
        return windows

    @property
    def generated_tokens(self) -> int:
        """Largest number of tokens generated for an example; 0 if none are."""
        return 0

    def problems(self) -> list[tuple[str, str, str]]:
        """Returns fields that contradict each other, as (field, what is wrong, fix)."""
        return []

    @property
    def as_trained(self) -> TrainedTask:
        """This task, typed as one that a model is trained for.

        Raises:
            TypeError: it is another kind of task.
        """
        raise TypeError(f"{self.name} is not a task to train for")

    @property
    def needed_splits(self) -> tuple[str, ...]:
        """Splits that the data must have, besides the one that is scored."""
        return ("train",)

    @abstractmethod
    def columns(self) -> list[str]:
        """Returns the columns that every row must have."""

    @abstractmethod
    def parse_row(self, row: Mapping[str, Any]) -> Example:
        """Checks a row and returns its content.

        Raises:
            BadRow: the row cannot be used.
        """

    def group_examples(self, rows: list[Example]) -> list[Example]:
        """Makes the examples of a split from its parsed rows; by default each row is an example."""
        return rows

    @property
    def compares_choices(self) -> bool:
        """Whether choices are compared by their tokens, which must then differ."""
        return False

    def check_tokens(self, examples: Sequence[Example], tokenizer: Any) -> None:
        """Checks that the tokens tell the choices of these examples apart, if they are compared.

        Raises:
            DataError: they do not.
        """

    def check_splits(self, splits: Mapping[str, list[Example]], scored: str) -> None:
        """Checks that the splits suit each other; by default nothing is checked.

        Args:
            splits: all examples, by split.
            scored: name of the split that is scored.

        Raises:
            DataError: they do not.
        """

    @abstractmethod
    def tokenizer_texts(self, example: Example) -> list[str]:
        """Returns the texts of an example that a new tokenizer is trained on."""

    @abstractmethod
    def head(self) -> Head:
        """Returns the output layer that the model gets."""

    @abstractmethod
    def metric_names(self) -> list[str]:
        """Returns the names of the metrics that `compute_metrics` gives."""

    @abstractmethod
    def compute_metrics(self, reduced: Any, labels: Any, examples: Sequence[Example]) -> Scores:
        """Computes the metrics of a split.

        Args:
            reduced: results of `TrainedTask.reduce_logits`, one per row; or answers.
            labels: labels, one per row.
            examples: examples of the split.
        """


class TrainedTask(TaskBase):
    """Adds what training needs: model inputs with labels, and a loss."""

    cuts_texts: ClassVar[bool] = True
    """Whether the part of a text beyond `max_length` is lost."""
    validation_loss: ClassVar[str | None] = None
    """Metric of the task that is its loss over a whole split. It is reported as `loss`, and decides
    by default which checkpoint is best. None: the Trainer's mean of the batches, which suits a task
    whose rows all count the same."""

    @property
    def as_trained(self) -> TrainedTask:
        """This task."""
        return self

    @abstractmethod
    def training_features(self, example: Example, tokenizer: Any) -> list[ModelInputs]:
        """Returns token ids and labels of a training example; several rows if it is long."""

    @abstractmethod
    def scoring_features(self, example: Example, tokenizer: Any) -> list[ModelInputs]:
        """Returns token ids and labels of the rows that score an example.

        An example with choices has a row for each of them. Keys that are not in `INPUT_KEYS` are
        kept in the example, under `rows`, for `compute_metrics`.
        """

    def labels_shape(self, batch: int, tokens: int) -> tuple[int, ...]:
        """Returns the shape of the labels of B examples of S tokens: (B, S) or (B,)."""
        return (batch, tokens) if self.labels_per_token else (batch,)

    def logits(self, outputs: Any) -> Any:
        """Returns the part of the model's outputs that `loss` needs."""
        return outputs["logits"]

    def validation_scores(self, reduced: Any, labels: Any, examples: Sequence[Example]) -> Scores:
        """Computes the metrics of a split, with `loss` where the Trainer's is another."""
        scores = self.compute_metrics(reduced, labels, examples)
        name = self.validation_loss
        return scores if name is None else {**scores, "loss": scores[name]}

    @abstractmethod
    def loss(self, logits: Any, labels: Any, items: Any, smoothing: float) -> Any:
        """Computes the cross-entropy, summed over this micro-batch and divided by `items`.

        Args:
            logits: result of `logits`: (B, S, V) or (B, C), or a tuple of several.
            labels: (B, S) or (B,).
            items: number of labels that count in the whole global batch, over all ranks and
                micro-batches; None: in this micro-batch. Dividing by it makes the gradient that of
                the global batch, however it is split. (The models' own loss is a mean over the
                micro-batch, which `Trainer` then scales by the number of ranks: twice the gradient
                on two.)
            smoothing: label smoothing, 0 to 1.
        """

    def hide_padding(self, logits: Any, attention_mask: Any) -> Any:
        """Returns the outputs of a scored batch without those at padding, if a score reads them.

        Args:
            logits: (B, S, V) or (B, C), or a tuple of all of the model's outputs.
            attention_mask: (B, S), 0 at padding.
        """
        return logits

    @abstractmethod
    def reduce_logits(self, logits: Any, labels: Any) -> Any:
        """Reduces the outputs of a scored batch on the device, before ranks gather them.

        Args:
            logits: (B, S, V) or (B, C), or a tuple of all of the model's outputs.
            labels: (B, S) or (B,).

        Returns:
            A small tensor whose first dimension is B.
        """


def summed_cross_entropy(logits: Any, targets: Any, items: Any, smoothing: float) -> Any:
    """Computes the cross-entropy in fp32, summed over N targets and divided by `items`.

    Args:
        logits: (N, C).
        targets: (N,).
        items: divisor; None: N.
        smoothing: label smoothing, 0 to 1.
    """
    import torch

    total = torch.nn.functional.cross_entropy(
        logits.float(), targets, reduction="sum", label_smoothing=smoothing
    )
    return total / (max(targets.numel(), 1) if items is None else items)


def is_empty(value: Any) -> bool:
    """Returns whether a cell holds no text: nothing, or blanks alone."""
    return value is None or (isinstance(value, str) and not value.strip())


def column_text(row: Mapping[str, Any], column: str) -> str:
    """Returns the text in a column.

    Raises:
        BadRow: it is missing, empty or not text.
    """
    value = row.get(column)
    if is_empty(value):
        raise BadRow(
            column,
            "the text is empty",
            "fill it in, or set task.data.drop_empty: true",
            is_empty=True,
        )
    if not isinstance(value, str | int | float):
        raise BadRow(column, f"expected text, got {type(value).__name__}")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        what = "the text holds half of a surrogate pair, which is not a character"
        fix = "correct the row: an earlier step has cut the text in the middle of a character"
        raise BadRow(column, what, fix) from None
    return text


def choices_error(example: Example, error: ValueError, fields: str) -> DataError:
    """Returns an error that names the row whose choices cannot be compared.

    Args:
        example: the example, with its `place`.
        error: what is wrong.
        fields: the recipe's field of the choices.
    """
    return DataError(f"{example.get('place', 'a row')} {fields}: {error}")


def rows_error(problems: list[Problem]) -> InputError:
    """Returns an error that lists the first bad rows and counts the others."""
    hidden = len(problems) - MAX_PROBLEMS
    more = [Problem(problems[-1].where, "", f"… and {hidden} more rows")] if hidden > 0 else []
    return InputError(problems[:MAX_PROBLEMS] + more)


def unique(words: list[str]) -> list[str]:
    """Returns the words unchanged after checking that none is repeated.

    Raises:
        ValueError: a word is repeated; the model has one output for each.
    """
    repeated = [word for word, count in Counter(words).items() if count > 1]
    if repeated:
        raise ValueError(f"{shorten_list(repeated)} is listed more than once")
    return words


def shorten_list(words: Sequence[str], limit: int = 20) -> str:
    """Joins words with commas; of a long list only the first, and the number of all."""
    more = f", … ({len(words)} in all)" if len(words) > limit else ""
    return ", ".join(words[:limit]) + more
