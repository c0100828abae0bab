"""Tunes causal models on instructions: only the completion of a prompt carries the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from hpcft.core.records.base import OneLine
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
    column_text,
    shorten_list,
    summed_cross_entropy,
    unique,
)
from hpcft.tasks.data.templates import Template, fill_template, template_fields


class Instruction(TrainedTask):
    """Completes a prompt; with `choices`, also picks the likeliest and reports accuracy."""

    causal: ClassVar[bool] = True
    labels_per_token: ClassVar[bool] = True

    name: Literal["instruction"]
    """`instruction`."""
    prompt: Template
    """Prompt with `{column}` where a column's text goes; `{{` is a brace."""
    completion: Template
    """Completion, with `{column}` as in `prompt`; the end-of-text token is added."""
    choices: Annotated[
        list[OneLine], Field(default_factory=list, max_length=1000), AfterValidator(unique)
    ]
    """Possible completions, scored by their likelihood given the prompt."""
    length_normalised: bool = False
    """Whether to divide a choice's log-likelihood by its number of tokens before comparing."""

    @property
    def rows_per_example(self) -> int:
        """Number of rows that score one example: one for each choice."""
        return max(1, len(self.choices))

    def columns(self) -> list[str]:
        """Returns the columns that the templates name."""
        return list(dict.fromkeys(template_fields(self.prompt) + template_fields(self.completion)))

    def parse_row(self, row: Mapping[str, Any]) -> Example:
        """Returns `prompt` and `completion`, filled in."""
        values = {column: column_text(row, column) for column in self.columns()}
        example = {
            "prompt": fill_template(self.prompt, values),
            "completion": fill_template(self.completion, values),
        }
        if self.choices and example["completion"] not in self.choices:
            raise BadRow(
                ", ".join(template_fields(self.completion)),
                f"expected a completion among {shorten_list(self.choices)}, "
                f"got {example['completion']!r:.80}",
                "correct the row or add it to task.choices",
            )
        return example

    def tokenizer_texts(self, example: Example) -> list[str]:
        """Returns prompt and completion as one text."""
        return [example["prompt"] + example["completion"]]

    def head(self) -> Head:
        """Returns the language model's own head."""
        return Head("AutoModelForCausalLM")

    def _encode(
        self, prompt: str, completion: str, tokenizer: Any, *, adds_end: bool
    ) -> ModelInputs:
        """Tokenizes prompt and completion as one text, and labels the completion.

        As one text they give the tokens that the model meets later. The first token of the
        completion is found by the characters that it covers. A prompt that is too long loses its
        front; the completion is never cut for it.
        """
        encoded = tokenizer(prompt + completion, return_offsets_mapping=True)
        ids = list(encoded["input_ids"])
        offsets = encoded["offset_mapping"]
        if adds_end and tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
        start = next(
            (i for i, (left, right) in enumerate(offsets) if right > len(prompt) and right > left),
            len(offsets),
        )
        labels = [IGNORE_INDEX] * start + ids[start:]
        surplus = max(0, len(ids) - self.max_length)
        surplus = min(surplus, max(start - 1, 0))
        keep_first = 1 if surplus and offsets and offsets[0][0] == offsets[0][1] else 0  # keep BOS
        ids = ids[:keep_first] + ids[keep_first + surplus :]
        labels = labels[:keep_first] + labels[keep_first + surplus :]
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    def training_features(self, example: Example, tokenizer: Any) -> list[ModelInputs]:
        """Returns token ids with the end of text, and labels that are ignored on the prompt."""
        return [self._encode(example["prompt"], example["completion"], tokenizer, adds_end=True)]

    def scoring_features(self, example: Example, tokenizer: Any) -> list[ModelInputs]:
        """Returns one row per choice, without the end of text; else the training row."""
        if not self.choices:
            return self.training_features(example, tokenizer)
        return [
            self._encode(example["prompt"], choice, tokenizer, adds_end=False)
            for choice in self.choices
        ]

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
        names = classification_names(self.choices) if self.choices else []
        return ["completion_loss", "perplexity", *names]

    def compute_metrics(self, reduced: Any, labels: Any, examples: Sequence[Example]) -> Scores:
        """Computes loss and perplexity of the true completions, and accuracy among the choices."""
        scores = reduced.reshape(len(examples), self.rows_per_example, 2).astype("float64")
        truth = [self.choices.index(e["completion"]) if self.choices else 0 for e in examples]
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
            "classification", predictions=predictions, references=truth, labels=self.choices
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
