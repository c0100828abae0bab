"""Instruction tuning of causal models: a prompt, and a completion that alone carries the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from hpcft.core.records.base import OneLine
from hpcft.metrics import Scores, classification_names, compute_metric, merge_scores
from hpcft.tasks.base import (
    IGNORED,
    BadRow,
    Example,
    Head,
    ModelInputs,
    TrainedTask,
    shorten_list,
    summed_cross_entropy,
    text_of,
    unique,
)
from hpcft.tasks.data.templates import Template, fill_template, template_fields


class Instruction(TrainedTask):
    """Complete a prompt; with `choices`, also pick the likeliest of them and report accuracy."""

    causal: ClassVar[bool] = True
    labels_per_token: ClassVar[bool] = True

    name: Literal["instruction"]
    """`instruction`."""
    prompt: Template
    """Prompt with `{column}` where a column's text goes; `{{` is a brace."""
    completion: Template
    """Completion with `{column}` likewise; the end-of-text token is added."""
    choices: Annotated[
        list[OneLine], Field(default_factory=list, max_length=1000), AfterValidator(unique)
    ]
    """The completions that are possible: scored by their likelihood given the prompt."""
    length_normalised: bool = False
    """Divide a choice's log-likelihood by its tokens before comparing."""

    @property
    def rows_per_example(self) -> int:
        """Rows that score an example: one for each choice."""
        return max(1, len(self.choices))

    def columns(self) -> list[str]:
        """Columns that the templates name."""
        return list(dict.fromkeys(template_fields(self.prompt) + template_fields(self.completion)))

    def example(self, row: Mapping[str, Any]) -> Example:
        """`prompt` and `completion`, filled in."""
        values = {column: text_of(row, column) for column in self.columns()}
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

    def texts(self, example: Example) -> list[str]:
        """Prompt and completion together."""
        return [example["prompt"] + example["completion"]]

    def head(self) -> Head:
        """The language model's own head."""
        return Head("AutoModelForCausalLM")

    def _features(self, prompt: str, completion: str, tokenizer: Any, *, end: bool) -> ModelInputs:
        """Prompt and completion tokenised as one text, so that no token differs from its use later.

        The first token of the completion is found by the characters that it covers. Too long a
        prompt loses its front, never the completion.
        """
        encoded = tokenizer(prompt + completion, return_offsets_mapping=True)
        ids = list(encoded["input_ids"])
        offsets = encoded["offset_mapping"]
        if end and tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
        start = next(
            (i for i, (left, right) in enumerate(offsets) if right > len(prompt) and right > left),
            len(offsets),
        )
        labels = [IGNORED] * start + ids[start:]
        surplus = max(0, len(ids) - self.max_length)
        surplus = min(surplus, max(start - 1, 0))
        keep_first = 1 if surplus and offsets and offsets[0][0] == offsets[0][1] else 0  # BOS stays
        ids = ids[:keep_first] + ids[keep_first + surplus :]
        labels = labels[:keep_first] + labels[keep_first + surplus :]
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    def training_features(self, example: Example, tokenizer: Any) -> list[ModelInputs]:
        """Token ids with the end of text, and labels that are ignored on the prompt."""
        return [self._features(example["prompt"], example["completion"], tokenizer, end=True)]

    def scoring_features(self, example: Example, tokenizer: Any) -> list[ModelInputs]:
        """One row a choice, without the end of text; without choices, the row itself."""
        if not self.choices:
            return self.training_features(example, tokenizer)
        return [self._features(example["prompt"], c, tokenizer, end=False) for c in self.choices]

    def loss(self, logits: Any, labels: Any, items: Any, smoothing: float) -> Any:
        """Cross-entropy of the completion's tokens, each predicted from the position before it."""
        # Only the completion's positions are upcast: the whole of (B, S, V) in fp32 would be the
        # peak of the run for a vocabulary of 256 thousand.
        return summed_cross_entropy(*next_tokens(logits, labels), items, smoothing)

    def reduce_logits(self, logits: Any, labels: Any) -> Any:
        """Log-likelihood and number of the completion's tokens, as (B, 2) in float32 (as nats)."""
        logits = logits[0] if isinstance(logits, tuple) else logits
        return by_example(log_likelihoods(*next_tokens(logits, labels)), labels)

    def metric_names(self) -> list[str]:
        """Loss and perplexity; with choices also those of `metrics/classification`."""
        chosen = classification_names(self.choices) if self.choices else []
        return ["completion_loss", "perplexity", *chosen]

    def metrics(self, reduced: Any, labels: Any, examples: Sequence[Example]) -> Scores:
        """Accuracy among the choices, and loss and perplexity over the true completions' tokens."""
        rows_each = max(1, len(self.choices))
        scores = reduced.reshape(len(examples), rows_each, 2).astype("float64")
        truth = [self.choices.index(e["completion"]) if self.choices else 0 for e in examples]
        of_truth = scores[range(len(truth)), truth]
        result = compute_metric(
            "perplexity",
            predictions=-of_truth[:, 0],
            references=of_truth[:, 1],
            loss="completion_loss",
        )
        if not self.choices:
            return result
        judged = scores[..., 0]
        if self.length_normalised:
            judged = judged / scores[..., 1].clip(min=1.0)
        predictions = judged.argmax(-1).tolist()
        chosen = compute_metric(
            "classification", predictions=predictions, references=truth, labels=self.choices
        )
        return merge_scores(result, chosen)


def next_tokens(outputs: Any, labels: Any) -> tuple[Any, Any]:
    """The outputs (B, S, …) before each label that counts, as (N, …), and those labels (N,)."""
    targets = labels[:, 1:]
    counted = targets != IGNORED
    return outputs[:, :-1][counted], targets[counted]


def log_likelihoods(logits: Any, targets: Any) -> Any:
    """Log-likelihood (N,) in fp32 of targets (N,) under logits (N, V)."""
    return logits.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def by_example(scores: Any, labels: Any) -> Any:
    """Sum and number of each example's scores (B, 2); they come (N,) as `next_tokens` orders."""
    import torch

    counted = labels[:, 1:] != IGNORED
    per_token = scores.new_zeros(counted.shape)
    per_token[counted] = scores
    return torch.stack([per_token.sum(-1), counted.sum(-1).float()], dim=-1)
