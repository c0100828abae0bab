"""What every task answers: which columns it needs, what head, what features and what metrics."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hpcft.core.errors import InputError, Problem
from hpcft.core.records import Task
from hpcft.metrics import Scores

if TYPE_CHECKING:
    from hpcft.tasks.few_shot.task import FewShot

Example = dict[str, Any]
ModelInputs = dict[str, Any]


IGNORED = -100  # the label that PyTorch's cross-entropy leaves out
# What goes to the model; whatever else a row has is for the metrics.
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "labels")
MAX_PROBLEMS = 10  # rows told one by one; the rest is counted
_INTEGER = re.compile(r"-?[0-9]{1,9}")


Mode = Literal["finetune", "evaluate", "few_shot"]
"""What a run does: trains and scores, scores a finished model, or prompts one as it is."""


class BadRow(Exception):
    """A row that the task cannot use; `field` names the column, `what` says why."""

    def __init__(self, field: str, what: str, fix: str = "", *, empty: bool = False) -> None:
        super().__init__(what)
        self.problem = Problem("", field, what, fix)
        self.empty = empty


@dataclass(frozen=True)
class Head:
    """The output that a task puts on the model."""

    auto_class: str
    """Name of the `transformers` Auto class."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Configuration fields that go with it (`num_labels`, `id2label`)."""
    outputs: int | None = None
    """Outputs per position; None: the vocabulary."""
    module: str | None = None
    """A module that the model has to have, where the Auto class gives some models without it."""


class TaskBase(Task):
    """A task with its behaviour. A row becomes a checked Example, an Example becomes Features."""

    causal: ClassVar[bool] = False
    """Whether the model reads from left to right; decides the PEFT task type."""
    labels_per_token: ClassVar[bool] = False
    """Whether labels are as long as the text, and padded with it."""
    masks: ClassVar[bool] = False
    """Whether the tokenizer needs a mask token."""
    keeps_locations: ClassVar[bool] = False
    """Whether an example says as `place` which file and line it comes from."""

    def mode(self, *, trains: bool) -> Mode:
        """Returns what a run of this task does.

        Args:
            trains: whether the recipe's method trains anything.
        """
        return "finetune" if trains else "evaluate"

    @property
    def rows_per_example(self) -> int:
        """Rows that score an example."""
        return 1

    def rows_per_batch(self, windows: int) -> int:
        """Returns the rows that one forward pass scores, in a batch of so many full windows."""
        return windows

    @property
    def generated_tokens(self) -> int:
        """Tokens that are generated for an example; 0 where likelihoods are compared."""
        return 0

    def problems(self) -> list[tuple[str, str, str]]:
        """Returns what is wrong between the task's fields: field, what, fix."""
        return []

    @property
    def as_trained(self) -> TrainedTask:
        """This task as one that a model is trained for.

        Raises:
            TypeError: it is not.
        """
        raise TypeError(f"{self.name} is not a task to train for")

    @property
    def as_few_shot(self) -> FewShot:
        """This task as few-shot prompting.

        Raises:
            TypeError: it is not.
        """
        raise TypeError(f"{self.name} is not few-shot prompting")

    @property
    def needed_splits(self) -> tuple[str, ...]:
        """Splits that the data has to have, besides the one that is scored."""
        return ("train",)

    @abstractmethod
    def columns(self) -> list[str]:
        """Columns that every row has to have."""

    @abstractmethod
    def example(self, row: Mapping[str, Any]) -> Example:
        """The checked content of a row.

        Raises:
            BadRow: the row cannot be used.
        """

    def group_examples(self, examples: list[Example]) -> list[Example]:
        """The examples of a split from its rows, in their order; by default one from each."""
        return examples

    def check_splits(self, splits: Mapping[str, list[Example]], scored: str) -> None:
        """Refuses splits that do not go together; by default all do.

        Raises:
            DataError: they do not.
        """

    @abstractmethod
    def texts(self, example: Example) -> list[str]:
        """The texts of an example, to train a tokenizer on."""

    @abstractmethod
    def head(self) -> Head:
        """The model's output for this task."""

    @abstractmethod
    def metric_names(self) -> list[str]:
        """Names that `metrics` gives; `hpcft.metrics.facts` says what they are."""

    @abstractmethod
    def metrics(self, reduced: Any, labels: Any, examples: Sequence[Example]) -> Scores:
        """The scores of a split.

        Args:
            reduced: what was made of each row: that of `TrainedTask.reduce_logits`, or an answer.
            labels: of the rows.
            examples: of the split.
        """


class TrainedTask(TaskBase):
    """A task that a model is trained for: its examples become features with labels and a loss."""

    cuts_texts: ClassVar[bool] = True
    """Whether what is longer than `max_length` is lost."""

    @property
    def as_trained(self) -> TrainedTask:
        """This task."""
        return self

    @abstractmethod
    def training_features(self, example: Example, tokenizer: Any) -> list[ModelInputs]:
        """Token ids and labels of one training example; several rows if it is long."""

    @abstractmethod
    def scoring_features(self, example: Example, tokenizer: Any) -> list[ModelInputs]:
        """Token ids and labels of the rows that score one example; several if it has choices.

        Keys that are not among `INPUTS` are kept with the example, as its `rows`, for the metrics.
        """

    def labels_shape(self, batch: int, tokens: int) -> tuple[int, ...]:
        """Shape of the labels of B examples of S tokens: (B, S) or (B,)."""
        return (batch, tokens) if self.labels_per_token else (batch,)

    def logits(self, outputs: Any) -> Any:
        """What `loss` needs of the model's outputs."""
        return outputs["logits"]

    @abstractmethod
    def loss(self, logits: Any, labels: Any, items: Any, smoothing: float) -> Any:
        """Cross-entropy summed over this micro-batch and divided by `items`.

        Args:
            logits: of `logits`: (B, S, V) or (B, C), or a tuple of several.
            labels: (B, S) or (B,).
            items: labels that count in the whole global batch, over all ranks and micro-batches;
                None: in this micro-batch. Dividing by it makes the gradient that of the global
                batch, however it is split. (The models' own loss is a mean over the micro-batch,
                which `Trainer` then scales by the number of ranks: twice the gradient on two.)
            smoothing: label smoothing, 0 to 1.
        """

    @abstractmethod
    def reduce_logits(self, logits: Any, labels: Any) -> Any:
        """What is kept of a scored batch on the device, before anything is gathered.

        Args:
            logits: (B, S, V) or (B, C), or a tuple of all of the model's outputs.
            labels: (B, S) or (B,).

        Returns:
            A small tensor whose first dimension is B.
        """


def summed_cross_entropy(logits: Any, targets: Any, items: Any, smoothing: float) -> Any:
    """Cross-entropy in fp32 of logits (N, C) against targets (N,), summed, over `items`."""
    import torch

    total = torch.nn.functional.cross_entropy(
        logits.float(), targets, reduction="sum", label_smoothing=smoothing
    )
    return total / (max(targets.numel(), 1) if items is None else items)


def text_of(row: Mapping[str, Any], column: str) -> str:
    """The text in a column.

    Raises:
        BadRow: it is missing, empty or not text.
    """
    value = row.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadRow(
            column,
            "the text is empty",
            "fill it in, or set task.data.drop_empty: true",
            empty=True,
        )
    if not isinstance(value, str | int | float):
        raise BadRow(column, f"expected text, got {type(value).__name__}")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        what = "the text has half of a surrogate pair, which is no letter"
        raise BadRow(column, what, "it was cut apart in an earlier step: correct the row") from None
    return text


def rows_error(problems: list[Problem]) -> InputError:
    """The error for rows that cannot be used: the first of them, and how many more there are."""
    hidden = len(problems) - MAX_PROBLEMS
    more = [Problem(problems[-1].where, "", f"… and {hidden} more rows")] if hidden > 0 else []
    return InputError(problems[:MAX_PROBLEMS] + more)


def label_index(row: Mapping[str, Any], column: str, labels: list[str]) -> int:
    """The place among the labels of the one in a column, which holds its name or its index.

    Raises:
        BadRow: it holds neither.
    """
    value = row.get(column)
    text = "" if value is None or isinstance(value, bool | float) else str(value)
    for name in (text, text.strip()):
        if name in labels:
            return labels.index(name)
    # An index counts only where it cannot be meant as a label: not for the labels 1 to 5.
    if not _INTEGER.fullmatch(text.strip()) or any(map(_INTEGER.fullmatch, labels)):
        raise BadRow(
            column,
            f"expected one of {shorten_list(labels)}, got {value!r:.80}",
            "correct the row or add the label to task.labels",
        )
    index = int(text)
    if index == -1:
        raise BadRow(
            column,
            "the row has no label (-1, as in GLUE's test splits)",
            "use a labelled split, for example evaluation.split: validation",
        )
    if not 0 <= index < len(labels):
        raise BadRow(column, f"expected an index below {len(labels)}, got {index}")
    return index


def unique(words: list[str]) -> list[str]:
    """The same words; they may not repeat, because the model has one output for each."""
    twice = [word for word, count in Counter(words).items() if count > 1]
    if twice:
        raise ValueError(f"{shorten_list(twice)} stands there more than once")
    return words


def shorten_list(words: Sequence[str], most: int = 20) -> str:
    """The words in a row, the first of them if there are many."""
    more = f", … ({len(words)} in all)" if len(words) > most else ""
    return ", ".join(words[:most]) + more
