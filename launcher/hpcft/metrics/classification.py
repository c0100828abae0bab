"""Scores predicted labels: accuracy, precision, recall, F1 and Matthews correlation.

All values but `matthews` (-1 to 1) are shares from 0 to 1; higher is better. `precision`, `recall`
and `f1` are those of the second label when there are two labels (the positive class) and unweighted
means over the classes otherwise; `f1_macro` is always that mean, over the classes that some example
has or was predicted. `f1_micro` counts all decisions alike. `recall[label]` is the accuracy within
one class; `precision[label]` and `f1[label]` are likewise of one class. A quotient by 0 counts as
0. `majority` is the share of the most frequent label: what a constant prediction would score.

A prediction that is no label's index (-1 or None: no answer) is wrong, whatever is true.

`intervals` holds the 95 % bootstrap intervals of the values over all classes. `confusion` holds the
labels, and how many examples of each (a row) were predicted as each (a column), with a last column
for predictions without an answer if there are any; it is left out with more than 100 labels.

Shapes: R draws, N examples, K labels, C pairs of true and predicted label.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpcft.metrics.base import Metric, MetricInfo, Scores, merge_scores
from hpcft.metrics.bootstrap import sums_by_label, with_intervals, with_mean_intervals

MAX_CONFUSION_LABELS = 100
_PER_LABEL = ("precision", "recall", "f1")


def classification_names(labels: Sequence[str], *, allows_no_answer: bool = False) -> list[str]:
    """Returns the names of the values for these labels.

    Args:
        labels: names of the labels.
        allows_no_answer: whether some predictions may be no label.
    """
    names = ["accuracy", *_PER_LABEL, "f1_macro", "f1_micro", "matthews", "majority"]
    names += [f"{name}[{label}]" for name in _PER_LABEL for label in labels]
    return [*names, "no_answer"] if allows_no_answer else names


def compute_scores(
    predictions: Sequence[int | None],
    references: Sequence[int],
    labels: list[str],
    allows_no_answer: bool = False,
) -> Scores:
    """Scores predicted label indices against true ones.

    Args:
        predictions: index of the predicted label of each example (N,); -1 or None for no answer.
        references: index of the true label of each example (N,).
        labels: names of the labels (K,).
        allows_no_answer: whether to add `no_answer`, the share of predictions that are no label.
    """
    import numpy as np

    number = len(labels)
    truth = np.asarray(references, dtype=np.int64)
    predicted = np.asarray([-1 if p is None else p for p in predictions], dtype=np.int64)
    predicted[(predicted < 0) | (predicted >= number)] = number  # no answer
    pairs, counts = np.unique(np.stack([truth, predicted], 1), axis=0, return_counts=True)
    scores = _scores_over_classes(pairs, counts, number)
    correct, answered = truth == predicted, predicted < number
    shares = {"accuracy": correct, **({"f1_micro": correct} if answered.all() else {})}
    scores = merge_scores(scores, with_mean_intervals(shares))
    hits, answers, support = _counts(counts[None], pairs, number)
    scores["majority"] = support.max() / len(truth)
    by_label = {
        "precision": _ratio(hits, answers),
        "recall": _ratio(hits, support),
        "f1": _ratio(2 * hits, answers + support),
    }
    for name, (values,) in by_label.items():
        seen = (i for i in range(number) if answers[0, i] + support[0, i])
        scores |= {f"{name}[{labels[i]}]": float(values[i]) for i in seen}
    if allows_no_answer:
        scores["no_answer"] = (predicted == number).mean()
    if number <= MAX_CONFUSION_LABELS:
        table = np.zeros((number, number + 1), dtype=np.int64)
        np.add.at(table, (truth, predicted), 1)
        columns = number + bool(table[:, number].any())
        scores["confusion"] = {"labels": labels, "counts": table[:, :columns].tolist()}
    return scores


def _scores_over_classes(pairs: Any, counts: Any, number: int) -> Scores:
    """Returns the values over all classes with their intervals.

    For the intervals, two examples are added: one that is right and one that is wrong, in equal
    parts of each class that some example has or was predicted. With two classes, the intervals of
    precision and recall are Jeffreys intervals.

    Args:
        pairs: each pair of true and predicted label that occurs (C, 2).
        counts: how often it does (C,).
        number: number of labels, K.
    """
    import numpy as np

    seen = np.unique(pairs[pairs < number])
    other = (seen[:1] + 1) % max(number, 2)  # the wrong example of a single class needs another
    ring = seen if len(seen) > 1 else np.concatenate([seen, other])
    more = np.concatenate([np.stack([seen, seen], 1), np.stack([ring, np.roll(ring, 1)], 1)])
    kinds = np.concatenate([pairs, more])
    counts = np.concatenate([counts, np.zeros(len(more))])
    added = np.concatenate([np.zeros(len(pairs)), np.full(len(more), 1 / max(len(seen), 2))])

    def values(weights: Any) -> dict[str, Any]:
        hits, answers, support = _counts(weights, kinds, number)
        return _overall_values(hits, answers, support, seen)

    return with_intervals(counts, values, added)


def _counts(weights: Any, pairs: Any, number: int) -> list[Any]:
    """Returns the weights (R, K) of the right examples, the answers and the examples of a class."""
    import numpy as np

    truth, predicted = pairs.T
    hits = np.where(truth == predicted, truth, number)
    return [sums_by_label(weights, labels, number) for labels in (hits, predicted, truth)]


def _overall_values(hits: Any, answers: Any, support: Any, seen: Any) -> dict[str, Any]:
    """Returns the values over all classes (R,) from weights by class (R, K).

    Args:
        hits: weight of the examples of a class that were predicted as it.
        answers: weight of the examples that were predicted as it.
        support: weight of the examples that have it; in all 1.
        seen: classes that some example has or was predicted (S,).
    """
    import numpy as np

    f1 = _ratio(2 * hits, answers + support)
    by_class = {"precision": _ratio(hits, answers), "recall": _ratio(hits, support), "f1": f1}
    if hits.shape[1] == 2:
        headline = {name: values[:, 1] for name, values in by_class.items()}
    else:
        headline = {name: v[:, seen].mean(1) for name, v in by_class.items()}
    correct, answered, examples = hits.sum(1), answers.sum(1), support.sum(1)
    # Gorodkin 2004, doi:10.1016/j.compbiolchem.2004.09.006; no answer counts as one more predicted
    # class. Rounded sums may leave a little less than nothing.
    missing = examples - answered
    spread = np.clip(examples**2 - (answers**2).sum(1) - missing**2, 0, None)
    spread = spread * np.clip(examples**2 - (support**2).sum(1), 0, None)
    spread[spread < 1e-24] = 0.0
    agreement = correct * examples - (answers * support).sum(1)
    return {
        "accuracy": correct / examples,
        **headline,
        "f1_macro": f1[:, seen].mean(1),
        "f1_micro": 2 * correct / (answered + examples),
        "matthews": _ratio(agreement, np.sqrt(spread)),
    }


def _ratio(part: Any, whole: Any) -> Any:
    """Divides elementwise; 0 where the divisor is 0."""
    import numpy as np

    return np.divide(part, whole, out=np.zeros(whole.shape), where=whole != 0)


_OF_LABELS = "with two labels that of the second, else the mean over the labels"

METRIC = Metric(
    infos={
        "accuracy": MetricInfo("share of the examples that are right"),
        "precision": MetricInfo(_OF_LABELS),
        "recall": MetricInfo(_OF_LABELS),
        "f1": MetricInfo(_OF_LABELS),
        "f1_macro": MetricInfo("mean of the labels' F1"),
        "f1_micro": MetricInfo("F1 of all decisions; the accuracy, if every example has an answer"),
        "matthews": MetricInfo(
            "correlation of true and predicted labels; 0 is as good as chance", scale="-1 to 1"
        ),
        "majority": MetricInfo(
            "share of the most frequent label: what a constant prediction would score", None
        ),
        "precision[]": MetricInfo("share of the examples predicted as this label that have it"),
        "recall[]": MetricInfo("share of the examples with this label that were predicted as it"),
        "f1[]": MetricInfo("harmonic mean of this label's precision and recall"),
        "no_answer": MetricInfo("share of the examples whose answer is none of the labels", False),
    },
    inputs={"predictions": "int64", "references": "int64"},
    compute=compute_scores,
)
