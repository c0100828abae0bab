"""Pretraining from scratch: masked words and next sentences (Devlin et al. 2019, arXiv:1810.04805).

Shapes: B pairs, S tokens, V words.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from hpcft.core.records.base import ColumnName, Share
from hpcft.metrics import Scores, compute_metric
from hpcft.tasks.base import IGNORED, Example, Head, ModelInputs, TrainedTask, text_of

_TITLE = re.compile(r" ?= [^=].* = ?\s*")  # of an article, as WikiText has it; sections have more =
_HEADING = re.compile(r" ?= .* = ?\s*")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
WORDS_OF_A_TOKEN = 0.75  # of English, in a subword vocabulary; what is too long is cut


class Pretraining(TrainedTask):
    """Guess masked words, and whether the second of two texts follows the first.

    Rows are lines in their order. Where lines bear WikiText's titles (` = Title = `), a document
    goes from one to the next and headings are left out; else documents are parted by empty lines.
    A pair is two neighbouring pieces of a document, or half of the time (by `data.seed`) a piece
    and one of another document. The masks are drawn once, by seed and text, not anew each epoch.
    """

    labels_per_token: ClassVar[bool] = True
    masks: ClassVar[bool] = True

    name: Literal["pretraining"]
    """`pretraining`."""
    text: ColumnName = "text"
    """Column of the line."""
    mlm_probability: Share = Field(default=0.15)
    """Share of the tokens that are to be guessed: 80 % of them are masked, 10 % replaced by others
    and 10 % left as they are."""

    def columns(self) -> list[str]:
        """Columns that every row has to have."""
        return [self.text]

    def example(self, row: Mapping[str, Any]) -> Example:
        """`text`: a line, which may be empty."""
        value = row.get(self.text)
        is_empty = isinstance(value, str) and not value.strip()
        return {"text": "" if is_empty else text_of(row, self.text)}

    def group_examples(self, examples: list[Example]) -> list[Example]:
        """Pairs `first` and `second`, and `label`: 0 where it follows, 1 where it does not."""
        documents = [self._pieces(document) for document in _documents(examples)]
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

    def _pieces(self, lines: list[str]) -> list[str]:
        """The document in pieces of whole sentences, of which two fill a sequence."""
        sentences = [s for line in lines for s in _SENTENCE_END.split(line.strip()) if s]
        words = sum(len(sentence.split()) for sentence in sentences)
        wanted = min(self.max_length * WORDS_OF_A_TOKEN / 2, words / 2)
        pieces: list[str] = []
        held: list[str] = []
        for sentence in sentences:
            held.append(sentence)
            if sum(len(s.split()) for s in held) >= wanted:
                pieces.append(" ".join(held))
                held = []
        return pieces + ([" ".join(held)] if held else [])

    def texts(self, example: Example) -> list[str]:
        """Both pieces."""
        return [example["first"], example["second"]]

    def head(self) -> Head:
        """The vocabulary for each token, and two outputs for the pair."""
        return Head("AutoModelForPreTraining", module="cls.seq_relationship")

    def training_features(self, example: Example, tokenizer: Any) -> list[ModelInputs]:
        """Token ids with masks; labels (S,): the pair's first, then the masked tokens' ids.

        The first token is never masked, and its output is what the pair is judged by: so its place
        holds the label of the pair.
        """
        encoded = tokenizer(
            example["first"],
            example["second"],
            truncation="longest_first",
            max_length=self.max_length,
            return_special_tokens_mask=True,
        )
        special = encoded.pop("special_tokens_mask")
        ids = list(encoded["input_ids"])
        labels = [IGNORED] * len(ids)
        labels[0] = example["label"]
        draw = random.Random(f"{self.data.seed} {example['first']} {example['second']}")
        open_places = [place for place, is_special in enumerate(special) if not is_special]
        count = max(1, round(self.mlm_probability * len(open_places)))
        ordinary = [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids]
        for place in draw.sample(open_places, count):
            labels[place] = ids[place]
            chance = draw.random()
            if chance < 0.8:
                ids[place] = tokenizer.mask_token_id
            elif chance < 0.9:
                ids[place] = draw.choice(ordinary)
        return [{**encoded, "input_ids": ids, "labels": labels}]

    def scoring_features(self, example: Example, tokenizer: Any) -> list[ModelInputs]:
        """The same as for training."""
        return self.training_features(example, tokenizer)

    def logits(self, outputs: Any) -> Any:
        """Scores of the words (B, S, V), and of "follows" and "does not" (B, 2)."""
        return outputs["prediction_logits"], outputs["seq_relationship_logits"]

    def loss(self, logits: Any, labels: Any, items: Any, smoothing: float) -> Any:
        """The mean over pairs of both cross-entropies: over a pair's masked tokens, and its own.

        It is the sum of means that BERT was trained with, where all pairs have as many masked
        tokens. A pair counts as often as it has labels (its masked tokens and one), so that the
        parts of a global batch add up however it is split.
        """
        words, follows, counted, losses = self._parts(logits, labels, smoothing)
        weights = counted.sum(1) + 1
        each = losses.new_zeros(labels.shape[0]).index_add(0, words, losses)
        total = (weights * (each / counted.sum(1).clamp(min=1) + follows)).sum()
        return total / (weights.sum() if items is None else items)

    @staticmethod
    def _parts(logits: Any, labels: Any, smoothing: float) -> tuple[Any, Any, Any, Any]:
        """Pair of each masked token; losses of pairs; which tokens are masked; their losses."""
        from torch.nn.functional import cross_entropy

        counted = labels != IGNORED
        counted[:, 0] = False
        words = cross_entropy(
            logits[0][counted].float(), labels[counted], reduction="none", label_smoothing=smoothing
        )
        follows = cross_entropy(
            logits[1].float(), labels[:, 0], reduction="none", label_smoothing=smoothing
        )
        return counted.nonzero()[:, 0], follows, counted, words

    def reduce_logits(self, logits: Any, labels: Any) -> Any:
        """Sum of the masked tokens' losses, their number, those right, and whether the pair is.

        As (B, 4) in float32.
        """
        import torch

        pair, _, counted, losses = self._parts(logits, labels, 0.0)
        right = (logits[0][counted].argmax(-1) == labels[counted]).float()
        zeros = losses.new_zeros(labels.shape[0])
        return torch.stack(
            [
                zeros.index_add(0, pair, losses),
                counted.sum(1).float(),
                zeros.index_add(0, pair, right),
                (logits[1].argmax(-1) == labels[:, 0]).float(),
            ],
            dim=1,
        )

    def metric_names(self) -> list[str]:
        """Loss, perplexity and accuracy over masked tokens, accuracy over pairs."""
        return ["masked_loss", "perplexity", "masked_accuracy", "next_sentence_accuracy"]

    def metrics(self, reduced: Any, labels: Any, examples: Sequence[Example]) -> Scores:
        """Perplexity is exp of the mean cross-entropy over all masked tokens, not over batches."""
        losses, counts, _, _ = reduced.T.tolist()
        _, tokens, right, pairs = reduced.astype("float64").sum(axis=0).tolist()
        return {
            **compute_metric(
                "perplexity", predictions=losses, references=counts, loss="masked_loss"
            ),
            "masked_accuracy": right / max(tokens, 1.0),
            "next_sentence_accuracy": pairs / len(reduced),
        }


def _documents(examples: list[Example]) -> list[list[str]]:
    """The lines of each document, headings and empty lines left out."""
    lines = [example["text"] for example in examples]
    titled = any(_TITLE.fullmatch(line) for line in lines)
    documents: list[list[str]] = [[]]
    for line in lines:
        if _TITLE.fullmatch(line) if titled else not line:
            documents.append([])
        elif line and not (titled and _HEADING.fullmatch(line)):
            documents[-1].append(line)
    return documents
