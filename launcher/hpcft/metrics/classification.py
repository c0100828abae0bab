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

Shapes: R resamples, N examples, K labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpcft.metrics.base import Metric, MetricInfo, Scores
from hpcft.metrics.bootstrap import label_counts, with_intervals

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
    correct = np.where(truth == predicted, truth, number)

    def counts(drawn: Any) -> list[Any]:
        return [label_counts(column, drawn, number) for column in (correct, predicted, truth)]

    scores = with_intervals(len(truth), lambda drawn: _overall_values(*counts(drawn)))
    hits, answers, support = (column[0] for column in counts(np.arange(len(truth))[None]))
    scores["majority"] = support.max() / len(truth)
    by_label = {
        "precision": _ratio(hits, answers),
        "recall": _ratio(hits, support),
        "f1": _ratio(2 * hits, answers + support),
    }
    for name, values in by_label.items():
        seen = (i for i in range(number) if answers[i] + support[i])
        scores |= {f"{name}[{labels[i]}]": float(values[i]) for i in seen}
    if allows_no_answer:
        scores["no_answer"] = (predicted == number).mean()
    if number <= MAX_CONFUSION_LABELS:
        table = np.zeros((number, number + 1), dtype=np.int64)
        np.add.at(table, (truth, predicted), 1)
        columns = number + bool(table[:, number].any())
        scores["confusion"] = {"labels": labels, "counts": table[:, :columns].tolist()}
    return scores


def _overall_values(hits: Any, answers: Any, support: Any) -> dict[str, Any]:
    """Returns the values over all classes (R,) from counts by class (R, K).

    Args:
        hits: examples of a class that were predicted as it.
        answers: examples that were predicted as it.
        support: examples that have it.
    """
    import numpy as np

    seen = answers + support > 0
    f1 = _ratio(2 * hits, answers + support)
    by_class = {"precision": _ratio(hits, answers), "recall": _ratio(hits, support), "f1": f1}
    if hits.shape[1] == 2:
        headline = {name: values[:, 1] for name, values in by_class.items()}
    else:
        headline = {name: _ratio(v.sum(1), seen.sum(1)) for name, v in by_class.items()}
    correct, answered = hits.sum(1).astype(float), answers.sum(1)
    examples = int(support[0].sum())
    # Gorodkin 2004, doi:10.1016/j.compbiolchem.2004.09.006; no answer counts as one more predicted
    # class. In floats: the products exceed 64 bits with some 50,000 examples.
    missing = (examples - answered).astype(float)
    predicted, true = answers.astype(float), support.astype(float)
    spread = (examples**2 - (predicted**2).sum(1) - missing**2) * (examples**2 - (true**2).sum(1))
    return {
        "accuracy": correct / examples,
        **headline,
        "f1_macro": _ratio(f1.sum(1), seen.sum(1)),
        "f1_micro": 2 * correct / (answered + examples),
        "matthews": _ratio(correct * examples - (predicted * true).sum(1), np.sqrt(spread)),
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
