"""Scores texts against the true ones: BLEU, ROUGE and METEOR, from 0 to 1; higher is better.

`bleu` is sacrebleu's over all texts together (it prints per cent), with its defaults: up to four
words, 13a tokens, exponential smoothing, case kept. `rouge1`, `rouge2` and `rougeL` are means of
the F1 with the nearest true text (rouge_score, without stemming). `meteor` is the mean of METEOR
with the nearest true text (nltk; Banerjee and Lavie 2005, with the weights of Lavie and Agarwal
2007), in which words match that are equal or have the same Porter stem. METEOR's third stage,
WordNet's synonyms, would need data from the network and is left out, so that values are a little
lower than with it. `intervals` holds the 95 % bootstrap intervals of the means.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from hpcft.metrics.base import Metric, MetricInfo, Scores
from hpcft.metrics.bootstrap import with_mean_intervals

ROUGE = ("rouge1", "rouge2", "rougeL")
_WORD = re.compile(r"\w+|[^\w\s]")


class _NoSynonyms:
    """Replaces WordNet for nltk: no word has synonyms."""

    def synsets(self, word: str) -> list[str]:
        return []


def compute_scores(predictions: Sequence[str], references: Sequence[list[str]]) -> Scores:
    """Scores texts against one or several true texts each.

    Args:
        predictions: the texts.
        references: the true texts of each.
    """
    from nltk.translate.meteor_score import meteor_score
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu

    scorer = RougeScorer(ROUGE)
    columns: dict[str, list[float]] = {name: [] for name in (*ROUGE, "meteor")}
    for text, truths in zip(predictions, references, strict=True):
        rouge = scorer.score_multi(truths, text)
        for name in ROUGE:
            columns[name].append(rouge[name].fmeasure)
        wanted = [_WORD.findall(truth) for truth in truths]
        meteor = meteor_score(wanted, _WORD.findall(text), wordnet=_NoSynonyms())
        columns["meteor"].append(meteor)
    # sacrebleu wants a list of the first true texts, one of the second true texts, …; a text that
    # has fewer than others has None there.
    most = max(len(truths) for truths in references)
    nth = [[t[i] if i < len(t) else None for t in references] for i in range(most)]
    scores = with_mean_intervals(columns)
    return {"bleu": corpus_bleu(predictions, nth).score / 100, **scores}


METRIC = Metric(
    infos={
        "bleu": MetricInfo("BLEU-4 over all answers together (sacrebleu, which prints per cent)"),
        "rouge1": MetricInfo("mean F1 over words with the nearest true answer"),
        "rouge2": MetricInfo("mean F1 over pairs of words with the nearest true answer"),
        "rougeL": MetricInfo(
            "mean F1 over the longest common sequence of words with the nearest true answer"
        ),
        "meteor": MetricInfo("mean METEOR of equal words and equal stems, without synonyms"),
    },
    inputs={"predictions": "string", "references": ["string"]},
    compute=compute_scores,
)
