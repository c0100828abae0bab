"""Extractive question answering: the span of a context that answers a question (SQuAD 1.1, 2.0).

A long context is read in windows that overlap; what the windows say is put together again.
Shapes: B windows, S tokens, N = n_best_size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from hpcft.core.records.base import ColumnName, PositiveInt
from hpcft.metrics import Scores, compute_metric, merge_scores, overlap_names, squad_names
from hpcft.tasks.base import (
    BadRow,
    Example,
    Head,
    ModelInputs,
    TrainedTask,
    summed_cross_entropy,
    text_of,
)

NULL = 0  # the token that stands for "no answer": the first, [CLS]
SPECIAL_TOKENS = 4  # around question and context, at most (RoBERTa: <s> Q </s></s> C </s>)


class QuestionAnswering(TrainedTask):
    """Find the answer to a question in its context; option names as in Hugging Face's example."""

    cuts_texts: ClassVar[bool] = False

    name: Literal["question_answering"]
    """`question_answering`."""
    question: ColumnName = "question"
    """Column of the question."""
    context: ColumnName = "context"
    """Column of the text that holds the answer."""
    answers: ColumnName = "answers"
    """Column of the true answers, as in SQuAD: `{text: […], answer_start: […]}`, or that as JSON;
    `answer_start` counts characters from 0. Of several, the first is trained on."""
    max_length: Annotated[int, Field(ge=8, le=1_000_000)] = 384
    """Tokens of a window: question and a part of the context."""
    doc_stride: PositiveInt = 128
    """Tokens of context that two neighbouring windows share."""
    max_query_length: PositiveInt = 64
    """Longest question in tokens; longer ones are cut at the end."""
    max_answer_length: PositiveInt = 30
    """Longest answer in tokens."""
    n_best_size: Annotated[int, Field(ge=1, le=1000)] = 20
    """Likeliest starts and ends of a window from which spans are made."""
    version_2_with_negative: bool = False
    """Whether a question may have no answer (SQuAD 2.0). A model that reads from left to right says
    so at the first token, which knows nothing of the text: expect little of the threshold there."""
    null_score_diff_threshold: float = 0.0
    """"No answer" is given where its score exceeds that of the best span by more than this."""

    @model_validator(mode="after")
    def _check_window(self) -> QuestionAnswering:
        if self.max_query_length + self.doc_stride + SPECIAL_TOKENS >= self.max_length:
            raise ValueError(
                f"max_length {self.max_length} leaves no room to go forward: it has to exceed "
                f"max_query_length + doc_stride + {SPECIAL_TOKENS}"
            )
        return self

    def columns(self) -> list[str]:
        """Columns that every row has to have."""
        return [self.question, self.context, self.answers]

    def example(self, row: Mapping[str, Any]) -> Example:
        """`question`, `context`, and `answers` as pairs of start and text."""
        question = text_of(row, self.question).strip()
        context = text_of(row, self.context)
        answers = self._answers(row)
        for start, text in answers:
            if context[start : start + len(text)] != text or start < 0:
                at = context.find(text)
                raise BadRow(
                    self.answers,
                    f"{text!r:.80} does not stand at character {start} of {self.context}",
                    f"correct answer_start: it stands at {at}" if at >= 0 else "correct the row",
                )
        if not answers and not self.version_2_with_negative:
            raise BadRow(
                self.answers,
                "the question has no answer",
                "use a labelled split, or set task.version_2_with_negative: true",
            )
        return {"question": question, "context": context, "answers": answers}

    def _answers(self, row: Mapping[str, Any]) -> list[tuple[int, str]]:
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
            raise BadRow(self.answers, "an answer is empty", "leave it out")
        return pairs

    def texts(self, example: Example) -> list[str]:
        """Question and context."""
        return [example["question"], example["context"]]

    def head(self) -> Head:
        """A linear layer with two outputs a token: starts here, ends here."""
        return Head("AutoModelForQuestionAnswering", {"num_labels": 2}, outputs=2)

    def training_features(self, example: Example, tokenizer: Any) -> list[ModelInputs]:
        """A row for each window; the label is the span's first and last token.

        In a window that the answer does not lie in as a whole, both are `NULL`.
        """
        rows = self._windows(example, tokenizer)
        for row in rows:
            offsets = row.pop("offsets")
            first, last = NULL, NULL
            if example["answers"]:
                start, text = example["answers"][0]
                end = start + len(text)
                inside = [i for i, at in enumerate(offsets) if at and at[0] < end and at[1] > start]
                if inside and offsets[inside[0]][0] <= start and offsets[inside[-1]][1] >= end:
                    first, last = inside[0], inside[-1]
            row["labels"] = [first, last]
        return rows

    def scoring_features(self, example: Example, tokenizer: Any) -> list[ModelInputs]:
        """The same windows; with each, where its tokens stand in the context."""
        rows = self.training_features(example, tokenizer)
        for row, window in zip(rows, self._windows(example, tokenizer), strict=True):
            row["offsets"] = window["offsets"]
        return rows

    def _windows(self, example: Example, tokenizer: Any) -> list[ModelInputs]:
        question = tokenizer(
            example["question"], add_special_tokens=False, return_offsets_mapping=True
        )
        cut = question["offset_mapping"][: self.max_query_length][-1:]
        encoded = tokenizer(
            example["question"][: cut[0][1]] if cut else "",
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
            kept = {
                key: encoded[key][index]
                for key in ("input_ids", "attention_mask", "token_type_ids")
                if key in encoded
            }
            offsets = [list(place) if text == 1 else None for text, place in places]
            rows.append({**kept, "offsets": offsets})
        return rows

    def labels_shape(self, batch: int, tokens: int) -> tuple[int, ...]:
        """Start and end, (B, 2)."""
        return (batch, 2)

    def logits(self, outputs: Any) -> Any:
        """Scores of start and end, (B, S) each."""
        return outputs["start_logits"], outputs["end_logits"]

    def loss(self, logits: Any, labels: Any, items: Any, smoothing: float) -> Any:
        """Mean of the cross-entropies of start and end over the tokens; labels are (B, 2)."""
        if items is None:
            items = 2 * len(labels)
        return sum(
            summed_cross_entropy(scores, labels[:, side], items, smoothing)
            for side, scores in enumerate(logits)
        )

    def reduce_logits(self, logits: Any, labels: Any) -> Any:
        """The N best starts and ends, each as token and score, and all scores of "no answer".

        As (B, 2, 2, N + 1) in float32: start and end, token and score; the last entry is that of
        the first token.
        """
        import torch

        sides = []
        for scores in logits[:2]:
            scores = scores.float()
            values, tokens = scores.topk(min(self.n_best_size, scores.shape[1]))
            missing = self.n_best_size - values.shape[1]
            values = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
            tokens = torch.nn.functional.pad(tokens.float(), (0, missing + 1))
            values = torch.cat([values, scores[:, NULL, None]], dim=1)
            sides.append(torch.stack([tokens, values], dim=1))
        return torch.stack(sides, dim=1)

    def metric_names(self) -> list[str]:
        """Those of `metrics/squad` and of `metrics/text_overlap`."""
        return [*squad_names(no_answers=self.version_2_with_negative), *overlap_names()]

    def metrics(self, reduced: Any, labels: Any, examples: Sequence[Example]) -> Scores:
        """As in `metrics/squad`; BLEU, ROUGE and METEOR over the questions that have an answer."""
        predictions: list[dict[str, Any]] = []
        at = 0
        for example in examples:
            windows = example["rows"]
            answer, doubt = self._answer(example, reduced[at : at + len(windows)])
            predictions.append({"answer": answer, "no_answer_score": doubt})
            at += len(windows)
        truths = [[text for _, text in example["answers"]] for example in examples]
        threshold = self.null_score_diff_threshold if self.version_2_with_negative else 1e300
        scores = compute_metric(
            "squad",
            predictions=predictions,
            references=[{"answers": texts} for texts in truths],
            threshold=threshold,
        )
        answered = [
            ("" if p["no_answer_score"] > threshold else p["answer"], texts)
            for p, texts in zip(predictions, truths, strict=True)
            if texts
        ]
        if not answered:
            return scores
        given, wanted = zip(*answered, strict=True)
        return merge_scores(
            scores, compute_metric("text_overlap", predictions=given, references=wanted)
        )

    def _answer(self, example: Example, reduced: Any) -> tuple[str, float]:
        """The best span of all windows, and by how much "no answer" outscores it."""
        best, text, null = -1e30, "", 1e30
        for window, (starts, ends) in zip(example["rows"], reduced, strict=True):
            offsets = window["offsets"]
            null = min(null, float(starts[1, -1] + ends[1, -1]))
            for first, start_score in self._candidates(starts, offsets):
                for last, end_score in self._candidates(ends, offsets):
                    score = start_score + end_score
                    if score > best and first <= last < first + self.max_answer_length:
                        best = score
                        text = example["context"][offsets[first][0] : offsets[last][1]]
        return text, null - best

    @staticmethod
    def _candidates(side: Any, offsets: list[Any]) -> list[tuple[int, float]]:
        """Tokens of the context among the best of a window, with their scores."""
        pairs = zip(side[0, :-1].astype(int).tolist(), side[1, :-1].tolist(), strict=True)
        places = dict(enumerate(offsets))  # a token beyond them is padding
        return [(token, score) for token, score in pairs if score > -1e30 and places.get(token)]
