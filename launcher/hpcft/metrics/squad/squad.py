"""Exact match and F1 of answers by the rules of SQuAD 1.1 and 2.0: shares from 0 to 1."""

import collections
import re
import string

import datasets
import evaluate

from hpcft.metrics.bootstrap import mean_values, with_intervals

_DESCRIPTION = """\
Answers are compared after lower-casing and without punctuation, articles (a, an, the) and surplus
blanks. `exact` is the share of questions whose answer equals one of the true ones, `f1` the mean of
the best F1 over words with one of them. All shares go from 0 to 1 (the official script prints per
cent); higher is better. A question without a true answer is answered rightly by the empty text.

A prediction is taken for "no answer" where its `no_answer_score` is above `threshold`. Where some
questions have no answer, `HasAns_` and `NoAns_` are the values over the questions that have one and
those that have none, and `best_exact` and `best_f1` what the best threshold would have given, which
is `best_exact_thresh` and `best_f1_thresh`: chosen on the very questions that it is scored on.

`intervals` holds the 95 % bootstrap intervals of `exact` and `f1`.
"""
_CITATION = "Rajpurkar et al. 2016 (arXiv:1606.05250) and 2018 (arXiv:1806.03822)"

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalised(text: str) -> str:
    """The text in lower case, without punctuation and articles, its words apart by one blank."""
    letters = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", letters).split())


def exact(truth: str, answer: str) -> float:
    """1 if both are the same after normalisation."""
    return float(normalised(truth) == normalised(answer))


def f1(truth: str, answer: str) -> float:
    """Harmonic mean of precision and recall over words; of an empty text, whether both are."""
    wanted, given = normalised(truth).split(), normalised(answer).split()
    if not wanted or not given:
        return float(wanted == given)
    common = (collections.Counter(wanted) & collections.Counter(given)).total()
    return 2 * common / (len(wanted) + len(given))


def best_threshold(
    raw: list[float], has_answer: list[bool], answers: list[str], no_answer_scores: list[float]
) -> tuple[float, float]:
    """The highest mean that any threshold gives, and that threshold.

    From "answer nothing" on, questions are answered in the order of their scores.
    """
    score = best = float(sum(not has for has in has_answer))
    threshold = 0.0
    for i in sorted(range(len(raw)), key=lambda i: no_answer_scores[i]):
        score += raw[i] if has_answer[i] else -bool(answers[i])
        if score > best:
            best, threshold = score, no_answer_scores[i]
    return best / len(raw), threshold


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION)
class Squad(evaluate.Metric):  # type: ignore[misc]
    """Scores of answers against the true ones."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description="predictions: answer and no_answer_score; references: true answers",
            features=datasets.Features(
                {
                    "predictions": {
                        "answer": datasets.Value("string"),
                        "no_answer_score": datasets.Value("float64"),
                    },
                    "references": {"answers": datasets.Sequence(datasets.Value("string"))},
                }
            ),
        )

    def _compute(self, predictions, references, threshold=0.0):  # type: ignore[no-untyped-def]
        answers = [prediction["answer"] for prediction in predictions]
        doubts = [prediction["no_answer_score"] for prediction in predictions]
        # A true answer of which normalisation leaves nothing ("the") counts for none.
        truths = [[t for t in r["answers"] if normalised(t)] or [""] for r in references]
        has_answer = [bool(reference["answers"]) for reference in references]
        result: dict[str, float] = {}
        counted: dict[str, list[float]] = {}
        for name, score in (("exact", exact), ("f1", f1)):
            pairs = zip(truths, answers, strict=True)
            raw = [max(score(t, answer) for t in truth) for truth, answer in pairs]
            final = [
                value if doubt <= threshold else float(not has)
                for value, doubt, has in zip(raw, doubts, has_answer, strict=True)
            ]
            counted[name] = final
            if all(has_answer):
                continue
            for group, wanted in (("HasAns", True), ("NoAns", False)):
                of_group = [v for v, has in zip(final, has_answer, strict=True) if has is wanted]
                if of_group:
                    result[f"{group}_{name}"] = sum(of_group) / len(of_group)
            best = best_threshold(raw, has_answer, answers, doubts)
            result[f"best_{name}"], result[f"best_{name}_thresh"] = best
        return with_intervals(len(answers), mean_values(counted)) | result
