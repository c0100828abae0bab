"""BLEU, ROUGE and METEOR of texts against the true ones: from 0 to 1, higher is better."""

import re

import datasets
import evaluate
from nltk.translate.meteor_score import meteor_score
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu

from hpcft.metrics.bootstrap import mean_values, with_intervals

_DESCRIPTION = """\
All values go from 0 to 1 (sacrebleu prints per cent). `bleu` is sacrebleu's over all texts
together, with its defaults: words of up to four, 13a tokens, exponential smoothing, case kept.
`rouge1`, `rouge2` and `rougeL` are means of the F1 with the nearest true text (rouge_score, without
stemming), `meteor` the mean of METEOR with the nearest one (nltk; Banerjee and Lavie 2005, with the
weights of Lavie and Agarwal 2007), in which words match that are equal or have the same Porter
stem. WordNet's synonyms, the third stage of METEOR, would need data from the network and are left
out: values are a little lower than with them. `intervals` holds the 95 % bootstrap intervals of the
means.
"""

ROUGE = ("rouge1", "rouge2", "rougeL")
_WORD = re.compile(r"\w+|[^\w\s]")


class NoSynonyms:
    """Stands where nltk expects WordNet."""

    def synsets(self, word: str) -> list[str]:
        """None."""
        return []


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION)
class TextOverlap(evaluate.Metric):  # type: ignore[misc]
    """Scores of texts against one or several true ones each."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description="predictions: texts; references: lists of true texts",
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
        )

    def _compute(self, predictions, references):  # type: ignore[no-untyped-def]
        scorer = RougeScorer(ROUGE)
        columns: dict[str, list[float]] = {name: [] for name in (*ROUGE, "meteor")}
        for text, truths in zip(predictions, references, strict=True):
            found = scorer.score_multi(truths, text)
            for name in ROUGE:
                columns[name].append(found[name].fmeasure)
            wanted = [_WORD.findall(truth) for truth in truths]
            columns["meteor"].append(
                meteor_score(wanted, _WORD.findall(text), wordnet=NoSynonyms())
            )
        # One list for the first true text of each, one for the second, …; not all have as many.
        most = max(len(truths) for truths in references)
        nth = [[t[i] if i < len(t) else None for t in references] for i in range(most)]
        result = with_intervals(len(predictions), mean_values(columns))
        return {"bleu": corpus_bleu(predictions, nth).score / 100, **result}
