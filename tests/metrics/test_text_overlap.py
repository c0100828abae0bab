"""BLEU, ROUGE and METEOR equal their libraries and hand computations."""

from __future__ import annotations

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from hpcft.metrics import compute_metric, metric_values
from hpcft.metrics.text_overlap import METRIC

TEXTS = [
    ("the cat sat on the mat", ["the cat sat on a mat", "a cat was sitting on the mat"]),
    ("Norman conquests", ["the Norman conquest of England"]),
    ("", ["Paris"]),
    ("in the 10th century", ["in the 10th century", "the 10th", "10th century"]),
]


def test_text_overlap_equals_the_libraries() -> None:
    texts, truths = [text for text, _ in TEXTS], [truth for _, truth in TEXTS]
    scores = compute_metric("text_overlap", predictions=texts, references=truths)
    first, second, third = [
        [truth[i] if i < len(truth) else None for truth in truths] for i in range(3)
    ]
    bleu = sacrebleu.corpus_bleu(texts, [first, second, third])
    assert scores["bleu"] == pytest.approx(bleu.score / 100)
    assert 0.3 < scores["bleu"] < 1
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for name in ("rouge1", "rouge2", "rougeL"):
        best = [
            max(scorer.score(truth, text)[name].fmeasure for truth in wanted)
            for text, wanted in TEXTS
        ]
        assert scores[name] == pytest.approx(sum(best) / len(best))
    assert set(metric_values(scores)) == set(METRIC.infos)


def test_meteor_equals_a_hand_computation() -> None:
    """Lavie and Agarwal 2007: F weighs recall 9 to 1, less half of (chunks / matches)³."""
    cases = [
        ("the cat sat", "the cat sat", 1 - 0.5 * (1 / 3) ** 3),  # one chunk of three
        ("sat the cat", "the cat sat", 1 - 0.5 * (2 / 3) ** 3),
        ("conquests", "conquest", 1 - 0.5),  # the same stem
        ("feline", "cat", 0),  # a synonym: not known here
        ("the cat", "the cat sat down", 10 * 1 * 0.5 / (0.5 + 9 * 1) * (1 - 0.5 * (1 / 2) ** 3)),
    ]
    for text, truth, wanted in cases:
        scores = compute_metric("text_overlap", predictions=[text], references=[[truth]])
        assert scores["meteor"] == pytest.approx(wanted), text
