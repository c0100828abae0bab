"""Scores answers by the rules of SQuAD 1.1 and 2.0: exact match and F1, shares from 0 to 1.

Answers are compared after lower-casing and without punctuation, articles (a, an, the) and surplus
blanks. `exact` is the share of questions whose answer equals one of the true ones, `f1` the mean of
the best F1 over words with one of them. All shares go from 0 to 1 (the official script prints per
cent); higher is better. For a question without a true answer the empty text is the right answer.

A prediction counts as "no answer" where its `no_answer_score` is above `threshold`. Where some
questions have no answer, `HasAns_` and `NoAns_` are the values over the questions that have one and
those that have none, and `best_exact` and `best_f1` are the values at the best threshold, which is
`best_exact_thresh` and `best_f1_thresh`: it is chosen on the very questions that are scored. Where
it is best to answer none of them, it is 1 below the lowest score.

`intervals` holds the 95 % bootstrap intervals of `exact` and `f1`, and of their groups.
"""

from __future__ import annotations

import collections
import itertools
import math
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from hpcft.metrics.base import Metric, MetricInfo, Scores, merge_scores
from hpcft.metrics.bootstrap import with_mean_intervals

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def squad_names(*, no_answers: bool) -> list[str]:
    """Returns the names of the values, with or without questions that have no answer."""
    names = ["exact", "f1"]
    if no_answers:
        names += [f"{group}_{name}" for name in names[:2] for group in ("HasAns", "NoAns", "best")]
        names += [f"best_{name}_thresh" for name in names[:2]]
    return names


def compute_scores(
    predictions: Sequence[Mapping[str, Any]],
    references: Sequence[Mapping[str, list[str]]],
    threshold: float = 0.0,
) -> Scores:
    """Scores answers against the true ones.

    Args:
        predictions: of each question the `answer` and the `no_answer_score`.
        references: of each question the true `answers`; none if it has no answer.
        threshold: `no_answer_score` above which a prediction counts as "no answer".
    """
    answers = [prediction["answer"] for prediction in predictions]
    no_answer_scores = [prediction["no_answer_score"] for prediction in predictions]
    # A true answer of which normalisation leaves nothing ("the") counts as none.
    truths = [[t for t in r["answers"] if _normalised(t)] or [""] for r in references]
    has_answer = [bool(reference["answers"]) for reference in references]
    scores: Scores = {}
    columns: dict[str, list[float]] = {}
    by_group: dict[str, dict[str, list[float]]] = {}
    for name, score in (("exact", exact), ("f1", f1)):
        pairs = zip(truths, answers, strict=True)
        raw = [max(score(t, answer) for t in truth) for truth, answer in pairs]
        final = [
            value if no_answer_score <= threshold else float(not has)
            for value, no_answer_score, has in zip(raw, no_answer_scores, has_answer, strict=True)
        ]
        columns[name] = final
        if all(has_answer):
            continue
        for group, wanted in (("HasAns", True), ("NoAns", False)):
            of_group = [v for v, has in zip(final, has_answer, strict=True) if has is wanted]
            if of_group:
                scores[f"{group}_{name}"] = sum(of_group) / len(of_group)
                by_group.setdefault(group, {})[f"{group}_{name}"] = of_group
        best = _best_threshold(raw, has_answer, no_answer_scores)
        scores[f"best_{name}"], scores[f"best_{name}_thresh"] = best
    groups = map(with_mean_intervals, (columns, *by_group.values()))
    return merge_scores(*groups, scores)


def _normalised(text: str) -> str:
    """Returns the text in lower case, without punctuation, articles and surplus blanks."""
    letters = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", letters).split())


def exact(truth: str, answer: str) -> float:
    """Returns 1 if both texts are the same after normalisation, else 0."""
    return float(_normalised(truth) == _normalised(answer))


def f1(truth: str, answer: str) -> float:
    """Returns the F1 over words; if one text is empty, 1 if both are, else 0."""
    wanted, given = _normalised(truth).split(), _normalised(answer).split()
    if not wanted or not given:
        return float(wanted == given)
    common = (collections.Counter(wanted) & collections.Counter(given)).total()
    return 2 * common / (len(wanted) + len(given))


def _best_threshold(
    raw: list[float], has_answer: list[bool], no_answer_scores: list[float]
) -> tuple[float, float]:
    """Returns the highest mean that any threshold gives, and the lowest such threshold.

    As the official script, it starts from "no question is answered" and answers one after the
    other, in the order of scores. There, scores are probabilities, and 0 answers none; here they
    are differences of logits, and a threshold that answers none lies below the lowest. Questions of
    equal score are answered together, since no threshold parts them.
    """
    score = best = float(sum(not has for has in has_answer))
    lowest = min(no_answer_scores)
    threshold = min(lowest - 1.0, math.nextafter(lowest, -math.inf))
    order = sorted(range(len(raw)), key=no_answer_scores.__getitem__)
    for level, group in itertools.groupby(order, key=no_answer_scores.__getitem__):
        score += sum(raw[i] - (not has_answer[i]) for i in group)
        if score > best + 1e-9:  # sums of F1 are rounded
            best, threshold = score, level
    return best / len(raw), threshold


_BEST = "at the threshold that is best on these very questions"

METRIC = Metric(
    infos={
        "exact": MetricInfo("share of the questions whose answer equals a true one (SQuAD)"),
        "f1": MetricInfo("mean F1 over the words shared with the nearest true answer"),
        "HasAns_exact": MetricInfo("`exact` over the questions that have an answer"),
        "HasAns_f1": MetricInfo("`f1` over the questions that have an answer"),
        "NoAns_exact": MetricInfo("`exact` over the questions that have none"),
        "NoAns_f1": MetricInfo("`f1` over the questions that have none"),
        "best_exact": MetricInfo(f"`exact` {_BEST}"),
        "best_f1": MetricInfo(f"`f1` {_BEST}"),
        "best_exact_thresh": MetricInfo("threshold of `best_exact`", None, "any"),
        "best_f1_thresh": MetricInfo("threshold of `best_f1`", None, "any"),
    },
    inputs={
        "predictions": {"answer": "string", "no_answer_score": "float64"},
        "references": {"answers": ["string"]},
    },
    compute=compute_scores,
    citation="Rajpurkar et al. 2016 (arXiv:1606.05250) and 2018 (arXiv:1806.03822)",
)
