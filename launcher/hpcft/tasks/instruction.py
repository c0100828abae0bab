"""Tunes causal models on instructions: only the completion of a prompt carries the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from hpcft.core.records.base import ColumnName, OneLine
from hpcft.metrics import compute_metric, merge_scores
from hpcft.metrics.base import Scores
from hpcft.metrics.classification import classification_names
from hpcft.tasks.base import (
    IGNORE_INDEX,
    BadRow,
    Example,
    Head,
    ModelInputs,
    TrainedTask,
    choices_error,
    shorten_list,
    summed_cross_entropy,
    unique,
)
from hpcft.tasks.data.templates import (
    UNLESS_NONE,
    LineTemplate,
    Template,
    choose_prompt,
    fill_choices,
    fill_template,
    template_fields,
)
from hpcft.tasks.labels import label_index
from hpcft.tasks.text_encoding import encode_choices, encode_texts


class Instruction(TrainedTask):
    """Completes a prompt; with `choices`, also picks the likeliest and reports accuracy."""

    causal: ClassVar[bool] = True
    labels_per_token: ClassVar[bool] = True
    keeps_locations: ClassVar[bool] = True
    # The Trainer's mean would take in the wrong choices, and weigh batches, not tokens.
    validation_loss: ClassVar[str | None] = "completion_loss"

    name: Literal["instruction"]
    """`instruction`."""
    prompt: Template
    """Prompt with `{column}` where a column's text goes, or `{column?}` where that text may be
    empty; `{{` is a brace."""
    prompt_when_empty: Annotated[Template | None, UNLESS_NONE] = None
    """Prompt of rows in which a column that only `prompt` names is empty (Alpaca's `input`)."""
    completion: Template | None = None
    """Completion, with `{column}` as in `prompt`; the end-of-text token is added. It is left out
    with `label`."""
    choices: Annotated[
        list[LineTemplate], Field(default_factory=list, max_length=1000), AfterValidator(unique)
    ]
    """Possible completions, scored by their likelihood given the prompt; with `{column}` they
    differ from row to row."""
    label: Annotated[ColumnName | None, UNLESS_NONE] = None
    """Column that names the true one of `choices`, where no text does: by its entry in `labels`, or
    by its index from 0."""
    labels: Annotated[list[OneLine] | None, Field(min_length=2), UNLESS_NONE] = None
    """Names of the choices in the column `label`, in the order of the choices."""
    length_normalised: bool = False
    """Whether to divide a choice's log-likelihood by its number of tokens before comparing."""

    @property
    def rows_per_example(self) -> int:
        """Number of rows that score one example: one for each choice."""
        return max(1, len(self.choices))

    @property
    def compares_choices(self) -> bool:
        """Whether there are choices."""
        return bool(self.choices)

    @property
    def choice_names(self) -> list[str]:
        """Name of each choice in the metrics."""
        return self.labels or self.choices

    def problems(self) -> list[tuple[str, str, str]]:
        """Returns fields that contradict each other, as (field, what is wrong, fix)."""
        found = []
        if (self.completion is None) == (self.label is None):
            what = "is required" if self.label is None else "is given by label already"
            fix = "give it, or label with choices" if self.label is None else "leave one out"
            found.append(("completion", what, fix))
        if self.label is not None and not self.choices:
            found.append(("choices", "is required with label", "list the possible completions"))
        if self.labels is not None and self.label is None:
            found.append(("labels", "applies to label only", "name the column with label"))
        if self.labels is not None and len(self.labels) != len(self.choices):
            what = f"expected one for each of {len(self.choices)} choices, got {len(self.labels)}"
            found.append(("labels", what, "list them in the order of the choices"))
        return found

    def columns(self) -> list[str]:
        """Returns the columns that the templates name, and that of the label."""
        templates = [self.prompt, self.prompt_when_empty, self.completion, *self.choices]
        named = [column for t in templates if t is not None for column in template_fields(t)]
        return list(dict.fromkeys([*named, *([self.label] if self.label is not None else [])]))

    def parse_row(self, row: Mapping[str, Any]) -> Example:
        """Returns `prompt` and `completion`, filled in; and `choices`, if rows have their own."""
        prompt = choose_prompt(self.prompt, self.prompt_when_empty, row)
        choices = fill_choices(self.choices, row, "choices")
        example = {"prompt": fill_template(prompt, row), "completion": ""}
        if self.label is not None:
            names = self.labels or [str(index) for index in range(len(choices))]
            example["completion"] = choices[label_index(row, self.label, names)]
        elif self.completion is not None:
            example["completion"] = fill_template(self.completion, row)
        if choices and example["completion"] not in choices:
            raise BadRow(
                ", ".join(template_fields(self.completion or "")),
                f"expected a completion among {shorten_list(choices)}, "
                f"got {example['completion']!r:.80}",
                "correct the row or add it to task.choices",
            )
        return {**example, "choices": choices} if choices != self.choices else example

    def choices_of(self, example: Example) -> list[str]:
        """Returns the choices of an example."""
        choices: list[str] = example.get("choices", self.choices)
        return choices

    def tokenizer_texts(self, example: Example) -> list[str]:
        """Returns prompt and completion as one text."""
        return [example["prompt"] + example["completion"]]

    def head(self) -> Head:
        """Returns the language model's own head."""
        return Head("AutoModelForCausalLM")

    def training_features(self, example: Example, tokenizer: Any) -> list[ModelInputs]:
        """Returns token ids with the end of text, and labels that are ignored on the prompt.

        Prompt and completion are tokenized as one text, which gives the tokens that the model meets
        later. The first token of the completion is found by the characters that it covers.
        """
        prompt = example["prompt"]
        (text,) = encode_texts(tokenizer, [prompt + example["completion"]])
        seam = next(
            (i for i, (left, right) in enumerate(text.offsets) if right > max(left, len(prompt))),
            len(text.body),
        )
        before, after = text.start + text.body[:seam], text.body[seam:] + text.end
        end = tokenizer.eos_token_id
        if end is not None and after[-1:] != [end]:
            after.append(end)
        return [self._fit_window(before, after, len(after), keep=len(text.start))]

    def scoring_features(self, example: Example, tokenizer: Any) -> list[ModelInputs]:
        """Returns one row per choice, without the end of text; else the training row.

        The rows of an example have the same prompt, of the same length.

        Raises:
            DataError: two choices have the same tokens.
        """
        choices = self.choices_of(example)
        if not choices:
            return self.training_features(example, tokenizer)
        try:
            text, before, after = encode_choices(tokenizer, example["prompt"], choices)
        except ValueError as error:
            raise choices_error(example, error, "task.choices") from None
        longest = max(map(len, after))
        return [self._fit_window(before, ids, longest, keep=len(text.start)) for ids in after]

    def check_tokens(self, examples: Sequence[Example], tokenizer: Any) -> None:
        """Checks that the choices of these examples differ in their tokens.

        Raises:
            DataError: two have the same tokens.
        """
        for example in examples:
            self.scoring_features(example, tokenizer)

    def _fit_window(
        self, before: list[int], after: list[int], longest: int, *, keep: int
    ) -> ModelInputs:
        """Cuts a row to `max_length`: the prompt at its front, and only then the completion.

        Args:
            before: tokens of the prompt.
            after: tokens of the completion, which are labelled.
            longest: length of the longest completion that this prompt has to leave room for.
            keep: number of the prompt's first tokens that are not cut.
        """
        surplus = min(len(before) + longest - self.max_length, len(before) - max(keep, 1))
        before = before[:keep] + before[keep + max(0, surplus) :]
        ids = (before + after)[: self.max_length]
        labels = ([IGNORE_INDEX] * len(before) + after)[: self.max_length]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    def loss(self, logits: Any, labels: Any, items: Any, smoothing: float) -> Any:
        """Computes the cross-entropy of the completion's tokens."""
        # Only the completion's positions are cast to fp32: with a vocabulary of 256 thousand, all
        # of (B, S, V) in fp32 would be the run's peak memory.
        return summed_cross_entropy(*next_token_pairs(logits, labels), items, smoothing)

    def reduce_logits(self, logits: Any, labels: Any) -> Any:
        """Returns log-likelihood in nats and number of the completion's tokens, (B, 2) in fp32."""
        logits = logits[0] if isinstance(logits, tuple) else logits
        return sum_by_example(log_likelihoods(*next_token_pairs(logits, labels)), labels)

    def metric_names(self) -> list[str]:
        """Returns loss and perplexity; with choices also the names of `metrics/classification`."""
        names = classification_names(self.choice_names) if self.choices else []
        return ["completion_loss", "perplexity", *names]

    def compute_metrics(self, reduced: Any, labels: Any, examples: Sequence[Example]) -> Scores:
        """Computes loss and perplexity of the true completions, and accuracy among the choices."""
        scores = reduced.reshape(len(examples), self.rows_per_example, 2).astype("float64")
        truth = [self.choices_of(e).index(e["completion"]) if self.choices else 0 for e in examples]
        true_scores = scores[range(len(truth)), truth]
        result = compute_metric(
            "perplexity",
            predictions=-true_scores[:, 0],
            references=true_scores[:, 1],
            loss="completion_loss",
        )
        if not self.choices:
            return result
        likelihoods = scores[..., 0]
        if self.length_normalised:
            likelihoods = likelihoods / scores[..., 1].clip(min=1.0)
        predictions = likelihoods.argmax(-1).tolist()
        accuracy = compute_metric(
            "classification", predictions=predictions, references=truth, labels=self.choice_names
        )
        return merge_scores(result, accuracy)


def next_token_pairs(outputs: Any, labels: Any) -> tuple[Any, Any]:
    """Returns the outputs before each label that counts, and those labels.

    Args:
        outputs: (B, S, …).
        labels: (B, S).

    Returns:
        Outputs (N, …) and labels (N,).
    """
    targets = labels[:, 1:]
    counted = targets != IGNORE_INDEX
    return outputs[:, :-1][counted], targets[counted]


def log_likelihoods(logits: Any, targets: Any) -> Any:
    """Returns the log-likelihood (N,) in fp32 of targets (N,) under logits (N, V)."""
    return logits.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def sum_by_example(scores: Any, labels: Any) -> Any:
    """Sums the scores of each example's tokens.

    Args:
        scores: (N,), in the order of `next_token_pairs`.
        labels: (B, S).

    Returns:
        Sum and number of each example's scores, (B, 2).
    """
    import torch

    counted = labels[:, 1:] != IGNORE_INDEX
    per_token = scores.new_zeros(counted.shape)
    per_token[counted] = scores
    return torch.stack([per_token.sum(-1), counted.sum(-1).float()], dim=-1)
