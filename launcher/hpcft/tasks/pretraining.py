"""Pretrains on masked words and next sentences (Devlin et al. 2019, arXiv:1810.04805).

Shapes: B pairs, S tokens, V words.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from hpcft.core.records.base import ColumnName, Share
from hpcft.metrics import compute_metric
from hpcft.metrics.base import Scores
from hpcft.metrics.pretraining import METRIC
from hpcft.tasks.base import IGNORE_INDEX, Example, Head, ModelInputs, TrainedTask, column_text

# An article's title in WikiText; headings of its sections have more `=`.
_TITLE = re.compile(r" ?= [^=].* = ?\s*")
_HEADING = re.compile(r" ?= .* = ?\s*")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
WORDS_PER_TOKEN = 0.75  # of English in a subword vocabulary; pieces that are too long are cut


class Pretraining(TrainedTask):
    """Guesses masked words, and whether the second of two texts follows the first.

    Rows are lines in their order. If some are WikiText titles (` = Title = `), a document reaches
    from one title to the next and headings are left out; otherwise empty lines separate documents.
    A pair is two neighbouring pieces of a document or, half of the time (by `data.seed`), a piece
    and one of another document. Masks are drawn once, by seed and text: each epoch has the same.
    """

    labels_per_token: ClassVar[bool] = True
    needs_mask_token: ClassVar[bool] = True
    validation_loss: ClassVar[str | None] = "masked_loss"

    name: Literal["pretraining"]
    """`pretraining`."""
    text: ColumnName = "text"
    """Column of the line."""
    mlm_probability: Share = Field(default=0.15)
    """Share of the tokens to guess: 80 % of them are masked, 10 % replaced by others and 10 % left
    as they are."""

    def columns(self) -> list[str]:
        """Returns the column of the line."""
        return [self.text]

    def parse_row(self, row: Mapping[str, Any]) -> Example:
        """Returns `text`: a line, which may be empty."""
        value = row.get(self.text)
        is_empty = isinstance(value, str) and not value.strip()
        return {"text": "" if is_empty else column_text(row, self.text)}

    def group_examples(self, rows: list[Example]) -> list[Example]:
        """Returns pairs: `first`, `second`, and `label`: 0 if it follows, 1 if it does not."""
        documents = [self._split_pieces(document) for document in _split_documents(rows)]
        documents = [pieces for pieces in documents if pieces]
        draw = random.Random(self.data.seed)
        pairs: list[Example] = []
        for number, pieces in enumerate(documents):
            at = 0
            while at < len(pieces) - 1:
                first, second, label = pieces[at], pieces[at + 1], 0
                at += 2
                if len(documents) > 1 and draw.random() < 0.5:
                    other = draw.randrange(len(documents) - 1)
                    second = draw.choice(documents[other + (other >= number)])
                    label = 1
                    at -= 1  # the piece that would have followed starts the next pair
                pairs.append({"first": first, "second": second, "label": label})
        return pairs

    def _split_pieces(self, lines: list[str]) -> list[str]:
        """Splits a document into pieces of whole sentences, two of which fill a sequence."""
        sentences = [s for line in lines for s in _SENTENCE_END.split(line.strip()) if s]
        words = sum(len(sentence.split()) for sentence in sentences)
        piece_words = min(self.max_length * WORDS_PER_TOKEN / 2, words / 2)
        pieces: list[str] = []
        piece: list[str] = []
        for sentence in sentences:
            piece.append(sentence)
            if sum(len(s.split()) for s in piece) >= piece_words:
                pieces.append(" ".join(piece))
                piece = []
        return pieces + ([" ".join(piece)] if piece else [])

    def tokenizer_texts(self, example: Example) -> list[str]:
        """Returns both pieces."""
        return [example["first"], example["second"]]

    def head(self) -> Head:
        """Returns outputs over the vocabulary for each token, and two for the pair."""
        return Head("AutoModelForPreTraining", module="cls.seq_relationship")

    def training_features(self, example: Example, tokenizer: Any) -> list[ModelInputs]:
        """Returns token ids with masks, and labels (S,): the pair's, then the masked tokens'.

        A pair that is too long becomes several (`_halve`), so that no sentence of it is lost but
        one that is too long by itself. The first token of a row is never masked, and the pair is
        judged by its output: so its place in the labels holds the pair's label.
        """
        encoded = tokenizer(
            example["first"],
            example["second"],
            return_special_tokens_mask=True,
            verbose=False,
        )
        if len(encoded["input_ids"]) > self.max_length:
            if halves := _halve(example):
                return [row for half in halves for row in self.training_features(half, tokenizer)]
            encoded = tokenizer(
                example["first"],
                example["second"],
                truncation="longest_first",
                max_length=self.max_length,
                return_special_tokens_mask=True,
            )
        special = encoded.pop("special_tokens_mask")
        ids = list(encoded["input_ids"])
        labels = [IGNORE_INDEX] * len(ids)
        labels[0] = example["label"]
        draw = random.Random(f"{self.data.seed} {example['first']} {example['second']}")
        maskable = [place for place, is_special in enumerate(special) if not is_special]
        count = max(1, round(self.mlm_probability * len(maskable)))
        ordinary = _ordinary_ids(tokenizer, len(tokenizer))
        for place in draw.sample(maskable, count):
            labels[place] = ids[place]
            chance = draw.random()
            if chance < 0.8:
                ids[place] = tokenizer.mask_token_id
            elif chance < 0.9:
                ids[place] = draw.choice(ordinary)
        return [{**encoded, "input_ids": ids, "labels": labels}]

    def scoring_features(self, example: Example, tokenizer: Any) -> list[ModelInputs]:
        """Returns the same rows as for training."""
        return self.training_features(example, tokenizer)

    def logits(self, outputs: Any) -> Any:
        """Returns scores of the words (B, S, V), and of "follows" and "does not" (B, 2)."""
        return outputs["prediction_logits"], outputs["seq_relationship_logits"]

    def loss(self, logits: Any, labels: Any, items: Any, smoothing: float) -> Any:
        """Computes the mean over pairs of two cross-entropies: of the masked tokens, and the pair.

        If all pairs have equally many masked tokens, this is the sum of means that BERT was trained
        with. A pair counts as often as it has labels (its masked tokens and one), so that the parts
        of a global batch add up however it is split.
        """
        pair, pair_losses, is_masked, token_losses = self._losses(logits, labels, smoothing)
        weights = is_masked.sum(1) + 1
        summed = token_losses.new_zeros(labels.shape[0]).index_add(0, pair, token_losses)
        total = (weights * (summed / is_masked.sum(1).clamp(min=1) + pair_losses)).sum()
        return total / (weights.sum() if items is None else items)

    @staticmethod
    def _losses(logits: Any, labels: Any, smoothing: float) -> tuple[Any, Any, Any, Any]:
        """Computes the cross-entropies of pairs and of masked tokens.

        Returns:
            Pair of each of N masked tokens (N,); losses of the pairs (B,); which tokens are masked
            (B, S); losses of the masked tokens (N,).
        """
        from torch.nn.functional import cross_entropy

        is_masked = labels != IGNORE_INDEX
        is_masked[:, 0] = False
        token_losses = cross_entropy(
            logits[0][is_masked].float(),
            labels[is_masked],
            reduction="none",
            label_smoothing=smoothing,
        )
        pair_losses = cross_entropy(
            logits[1].float(), labels[:, 0], reduction="none", label_smoothing=smoothing
        )
        return is_masked.nonzero()[:, 0], pair_losses, is_masked, token_losses

    def reduce_logits(self, logits: Any, labels: Any) -> Any:
        """Reduces each pair to four numbers, (B, 4) in fp32.

        They are the sum of its masked tokens' losses, the number of these tokens, how many of them
        are right, and whether the pair is right.
        """
        import torch

        pair, _, is_masked, losses = self._losses(logits, labels, 0.0)
        is_right = (logits[0][is_masked].argmax(-1) == labels[is_masked]).float()
        zeros = losses.new_zeros(labels.shape[0])
        return torch.stack(
            [
                zeros.index_add(0, pair, losses),
                is_masked.sum(1).float(),
                zeros.index_add(0, pair, is_right),
                (logits[1].argmax(-1) == labels[:, 0]).float(),
            ],
            dim=1,
        )

    def metric_names(self) -> list[str]:
        """Returns loss, perplexity and accuracy of masked tokens, and accuracy of pairs."""
        return list(METRIC.infos)

    def compute_metrics(self, reduced: Any, labels: Any, examples: Sequence[Example]) -> Scores:
        """Computes the metrics with `metrics/pretraining`."""
        columns = METRIC.inputs["predictions"]
        rows = [dict(zip(columns, row, strict=True)) for row in reduced.tolist()]
        return compute_metric("pretraining", predictions=rows)


def _split_documents(rows: list[Example]) -> list[list[str]]:
    """Returns the lines of each document, without headings and empty lines."""
    lines = [row["text"] for row in rows]
    has_titles = any(_TITLE.fullmatch(line) for line in lines)
    documents: list[list[str]] = [[]]
    for line in lines:
        if _TITLE.fullmatch(line) if has_titles else not line:
            documents.append([])
        elif line and not (has_titles and _HEADING.fullmatch(line)):
            documents[-1].append(line)
    return documents


@functools.lru_cache(maxsize=1)
def _ordinary_ids(tokenizer: Any, size: int) -> list[int]:
    """Returns the ids of a tokenizer of that size that are not special, which takes a while."""
    special = {*tokenizer.all_special_ids}
    return [i for i in range(size) if i not in special]


def _halve(pair: Example) -> list[Example]:
    """Returns two pairs of the same sentences, or nothing if a text is a single sentence.

    The halves of texts that follow each other do so too: they make the pairs. Texts of two
    documents are halved side by side.
    """
    texts = [_SENTENCE_END.split(pair[name]) for name in ("first", "second")]
    if min(map(len, texts)) < 2:
        return []
    (a, b), (c, d) = [
        (" ".join(text[: len(text) // 2]), " ".join(text[len(text) // 2 :])) for text in texts
    ]
    pairs = [(a, c), (b, d)] if pair["label"] else [(a, b), (c, d)]
    return [{"first": x, "second": y, "label": pair["label"]} for x, y in pairs]
