"""Answers questions with a span of a context, extractively (SQuAD 1.1, 2.0).

A long context is read in overlapping windows, whose answers are then compared.
Shapes: B windows, S tokens, N = n_best_size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from hpcft.core.records.base import ColumnName, PositiveInt
from hpcft.metrics import compute_metric, merge_scores, text_overlap
from hpcft.metrics.base import Scores
from hpcft.metrics.squad import squad_names
from hpcft.tasks.base import (
    BadRow,
    Example,
    Head,
    ModelInputs,
    TrainedTask,
    column_text,
    summed_cross_entropy,
)

NO_ANSWER_TOKEN = 0  # position that stands for "no answer": the first token, [CLS]
SPECIAL_TOKENS = 4  # around question and context, at most (RoBERTa: <s> Q </s></s> C </s>)


class QuestionAnswering(TrainedTask):
    """Finds the answer to a question in its context.

    The options are called as in Hugging Face's example script.
    """

    cuts_texts: ClassVar[bool] = False

    name: Literal["question_answering"]
    """`question_answering`."""
    question: ColumnName = "question"
    """Column of the question."""
    context: ColumnName = "context"
    """Column of the text that holds the answer."""
    answers: ColumnName = "answers"
    """Column of the true answers, as in SQuAD: `{text: […], answer_start: […]}`, or that as JSON;
    `answer_start` counts characters from 0. If there are several, the first is trained on."""
    max_length: Annotated[int, Field(ge=8, le=1_000_000)] = 384
    """Tokens of a window: the question and a part of the context."""
    doc_stride: PositiveInt = 128
    """Tokens of context that two neighbouring windows share."""
    max_query_length: PositiveInt = 64
    """Longest question in tokens; longer questions are cut at the end."""
    max_answer_length: PositiveInt = 30
    """Longest answer in tokens."""
    n_best_size: Annotated[int, Field(ge=1, le=1000)] = 20
    """Number of likeliest starts, and of ends, of a window from which spans are made."""
    version_2_with_negative: bool = False
    """Whether a question may have no answer (SQuAD 2.0). In a model that reads from left to right
    the first token, which says so, has not seen the text: expect little of the threshold there."""
    null_score_diff_threshold: float = 0.0
    """Margin by which the score of "no answer" has to exceed that of the best span."""

    @model_validator(mode="after")
    def _check_window(self) -> QuestionAnswering:
        if self.max_query_length + self.doc_stride + SPECIAL_TOKENS >= self.max_length:
            raise ValueError(
                f"max_length {self.max_length} leaves no room for new context in a window: it has "
                f"to exceed max_query_length + doc_stride + {SPECIAL_TOKENS}"
            )
        return self

    def columns(self) -> list[str]:
        """Returns the columns of question, context and answers."""
        return [self.question, self.context, self.answers]

    def parse_row(self, row: Mapping[str, Any]) -> Example:
        """Returns `question`, `context`, and `answers` as pairs of start and text."""
        question = column_text(row, self.question).strip()
        context = column_text(row, self.context)
        answers = self._read_answers(row)
        for start, text in answers:
            if context[start : start + len(text)] != text or start < 0:
                at = context.find(text)
                raise BadRow(
                    self.answers,
                    f"{text!r:.80} is not at character {start} of {self.context}",
                    f"correct answer_start: it is at {at}" if at >= 0 else "correct the row",
                )
        if not answers and not self.version_2_with_negative:
            raise BadRow(
                self.answers,
                "the question has no answer",
                "use a labelled split, or set task.version_2_with_negative: true",
            )
        return {"question": question, "context": context, "answers": answers}

    def _read_answers(self, row: Mapping[str, Any]) -> list[tuple[int, str]]:
        value: Any = row.get(self.answers)
        try:
            value = json.loads(value) if isinstance(value, str) else value
            texts, starts = value["text"], value["answer_start"]
            pairs = [(int(start), str(text)) for start, text in zip(starts, texts, strict=True)]
        except (KeyError, TypeError, ValueError):
            raise BadRow(
                self.answers,
                f"expected {{text: […], answer_start: […]}}, got {value!r:.80}",
                "give both lists the same length; empty ones mean no answer",
            ) from None
        if any(not text for _, text in pairs):
            raise BadRow(self.answers, "an answer is empty", "remove it from the row")
        return pairs

    def tokenizer_texts(self, example: Example) -> list[str]:
        """Returns question and context."""
        return [example["question"], example["context"]]

    def head(self) -> Head:
        """Returns a linear layer with two outputs per token: starts here, ends here."""
        return Head("AutoModelForQuestionAnswering", {"num_labels": 2}, outputs=2)

    def training_features(self, example: Example, tokenizer: Any) -> list[ModelInputs]:
        """Returns a row for each window, labelled with the span's first and last token.

        In a window that does not hold the whole answer, both are `NO_ANSWER_TOKEN`.
        """
        rows = self._encode_windows(example, tokenizer)
        for row in rows:
            offsets = row.pop("offsets")
            first, last = NO_ANSWER_TOKEN, NO_ANSWER_TOKEN
            if example["answers"]:
                start, text = example["answers"][0]
                end = start + len(text)
                inside = [i for i, at in enumerate(offsets) if at and at[0] < end and at[1] > start]
                if inside and offsets[inside[0]][0] <= start and offsets[inside[-1]][1] >= end:
                    first, last = inside[0], inside[-1]
            row["labels"] = [first, last]
        return rows

    def scoring_features(self, example: Example, tokenizer: Any) -> list[ModelInputs]:
        """Returns the same windows, each with the places of its tokens in the context."""
        rows = self.training_features(example, tokenizer)
        for row, window in zip(rows, self._encode_windows(example, tokenizer), strict=True):
            row["offsets"] = window["offsets"]
        return rows

    def _encode_windows(self, example: Example, tokenizer: Any) -> list[ModelInputs]:
        """Returns the inputs of each window; `offsets` has a token's characters in the context."""
        question = tokenizer(
            example["question"], add_special_tokens=False, return_offsets_mapping=True
        )
        last_token = question["offset_mapping"][: self.max_query_length][-1:]
        encoded = tokenizer(
            example["question"][: last_token[0][1]] if last_token else "",
            example["context"],
            truncation="only_second",
            max_length=self.max_length,
            stride=self.doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        rows = []
        for index in range(len(encoded["input_ids"])):
            places = zip(encoded.sequence_ids(index), encoded["offset_mapping"][index], strict=True)
            inputs = {
                key: encoded[key][index]
                for key in ("input_ids", "attention_mask", "token_type_ids")
                if key in encoded
            }
            offsets = [list(place) if text == 1 else None for text, place in places]
            rows.append({**inputs, "offsets": offsets})
        return rows

    def labels_shape(self, batch: int, tokens: int) -> tuple[int, ...]:
        """Returns the shape of starts and ends, (B, 2)."""
        return (batch, 2)

    def logits(self, outputs: Any) -> Any:
        """Returns the scores of start and end, (B, S) each."""
        return outputs["start_logits"], outputs["end_logits"]

    def loss(self, logits: Any, labels: Any, items: Any, smoothing: float) -> Any:
        """Computes the mean of the cross-entropies of start and end; labels are (B, 2)."""
        if items is None:
            items = 2 * len(labels)
        return sum(
            summed_cross_entropy(scores, labels[:, side], items, smoothing)
            for side, scores in enumerate(logits)
        )

    def hide_padding(self, logits: Any, attention_mask: Any) -> Any:
        """Returns the scores of start and end, (B, S) each, without padding.

        It would take places among the N best, the more of them the longer the batch is.
        """
        import torch

        hidden = attention_mask.to(logits[0].device) == 0
        return tuple(scores.float().masked_fill(hidden, -torch.inf) for scores in logits[:2])

    def reduce_logits(self, logits: Any, labels: Any) -> Any:
        """Returns the N best starts and ends, and the scores of "no answer".

        Returns:
            (B, 2, 2, N + 1) in fp32: start and end; token and score; the last entry is that of the
            first token.
        """
        import torch

        sides = []
        for scores in logits[:2]:
            scores = scores.float()
            values, tokens = scores.topk(min(self.n_best_size, scores.shape[1]))
            tokens = tokens.masked_fill(values == -torch.inf, 0)  # padding
            missing = self.n_best_size - values.shape[1]
            values = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
            tokens = torch.nn.functional.pad(tokens.float(), (0, missing + 1))
            values = torch.cat([values, scores[:, NO_ANSWER_TOKEN, None]], dim=1)
            sides.append(torch.stack([tokens, values], dim=1))
        return torch.stack(sides, dim=1)

    def metric_names(self) -> list[str]:
        """Returns the names of `metrics/squad` and of `metrics/text_overlap`."""
        return [*squad_names(no_answers=self.version_2_with_negative), *text_overlap.METRIC.infos]

    def compute_metrics(self, reduced: Any, labels: Any, examples: Sequence[Example]) -> Scores:
        """Computes SQuAD's metrics, and text overlap over the questions that have an answer."""
        predictions: list[dict[str, Any]] = []
        first = 0
        for example in examples:
            windows = example["rows"]
            answer, no_answer_score = self._best_span(
                example, reduced[first : first + len(windows)]
            )
            predictions.append({"answer": answer, "no_answer_score": no_answer_score})
            first += len(windows)
        truths = [[text for _, text in example["answers"]] for example in examples]
        threshold = self.null_score_diff_threshold if self.version_2_with_negative else 1e300
        scores = compute_metric(
            "squad",
            predictions=predictions,
            references=[{"answers": texts} for texts in truths],
            threshold=threshold,
        )
        answerable = [
            ("" if p["no_answer_score"] > threshold else p["answer"], texts)
            for p, texts in zip(predictions, truths, strict=True)
            if texts
        ]
        if not answerable:
            return scores
        answers, references = zip(*answerable, strict=True)
        return merge_scores(
            scores, compute_metric("text_overlap", predictions=answers, references=references)
        )

    def _best_span(self, example: Example, reduced: Any) -> tuple[str, float]:
        """Returns the best span of all windows, and how much "no answer" outscores it."""
        best, text, no_answer = -1e30, "", 1e30
        for window, (starts, ends) in zip(example["rows"], reduced, strict=True):
            offsets = window["offsets"]
            no_answer = min(no_answer, float(starts[1, -1] + ends[1, -1]))
            for first, start_score in self._candidates(starts, offsets):
                for last, end_score in self._candidates(ends, offsets):
                    score = start_score + end_score
                    if score > best and first <= last < first + self.max_answer_length:
                        best = score
                        text = example["context"][offsets[first][0] : offsets[last][1]]
        return text, no_answer - best

    @staticmethod
    def _candidates(side: Any, offsets: list[Any]) -> list[tuple[int, float]]:
        """Returns the best tokens of a window that lie in the context, with their scores."""
        pairs = zip(side[0, :-1].astype(int).tolist(), side[1, :-1].tolist(), strict=True)
        places = dict(enumerate(offsets))  # a token beyond them is padding
        return [(token, score) for token, score in pairs if score > -1e30 and places.get(token)]
