"""Accuracy, precision, recall, F1 and Matthews correlation of a classifier."""

from typing import Any

import datasets
import evaluate
import numpy as np

from hpcft.metrics.bootstrap import label_counts, with_intervals

_DESCRIPTION = """\
All values but `matthews` (-1 to 1) are shares from 0 to 1; higher is better. `precision`, `recall`
and `f1` are those of the second label when there are two labels (the positive class) and unweighted
means over the classes otherwise; `f1_macro` is always that mean, over the classes that some example
has or was given. `f1_micro` counts all decisions alike. `recall[label]` is the accuracy within one
class; `precision[label]` and `f1[label]` are likewise of one class. What would divide by nothing
is 0. `majority` is the share of the most frequent label: what a constant answer would score.

A prediction that is no label's index (-1 or None: no answer) is wrong, whatever is true.

`intervals` holds the 95 % bootstrap intervals of the values over all classes, `confusion` the
labels and how many examples of each (a row) were given each (a column), with a last column for no
answer where there is such a one; it is left out with more than 100 labels.
"""

MOST_CONFUSED = 100


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION)
class Classification(evaluate.Metric):  # type: ignore[misc]
    """Scores of predicted label indices against true ones."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description="predictions and references: label indices; labels: their names",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references, labels):  # type: ignore[no-untyped-def]
        number = len(labels)
        truth = np.asarray(references, dtype=np.int64)
        given = np.asarray([-1 if p is None else p for p in predictions], dtype=np.int64)
        given[(given < 0) | (given >= number)] = number  # no answer
        right = np.where(truth == given, truth, number)

        def counts(drawn: Any) -> list[Any]:
            return [label_counts(column, drawn, number) for column in (right, given, truth)]

        result = with_intervals(len(truth), lambda drawn: overall(*counts(drawn)))
        hits, answers, support = (column[0] for column in counts(np.arange(len(truth))[None]))
        result["majority"] = support.max() / len(truth)
        each = {"precision": (hits, answers), "recall": (hits, support),
                "f1": (2 * hits, answers + support)}  # fmt: skip
        for name, (part, whole) in each.items():
            values = ratio(part, whole)
            seen = (i for i in range(number) if answers[i] + support[i])
            result |= {f"{name}[{labels[i]}]": float(values[i]) for i in seen}
        if number <= MOST_CONFUSED:
            table = np.zeros((number, number + 1), dtype=np.int64)
            np.add.at(table, (truth, given), 1)
            columns = number + bool(table[:, number].any())
            result["confusion"] = {"labels": labels, "counts": table[:, :columns].tolist()}
        return result


def overall(hits: Any, answers: Any, support: Any) -> dict[str, Any]:
    """The values over all classes (R,), of counts by class (R, K).

    Args:
        hits: examples of a class that were given it.
        answers: examples that were given it.
        support: examples that have it.
    """
    seen = answers + support > 0
    f1 = ratio(2 * hits, answers + support)
    each = {"precision": ratio(hits, answers), "recall": ratio(hits, support), "f1": f1}
    if hits.shape[1] == 2:
        headline = {name: values[:, 1] for name, values in each.items()}
    else:
        headline = {name: ratio(v.sum(1), seen.sum(1)) for name, v in each.items()}
    right, answered = hits.sum(1).astype(float), answers.sum(1)
    examples = int(support[0].sum())
    # Gorodkin 2004, doi:10.1016/j.compbiolchem.2004.09.006; no answer is one more class that is
    # given. In floats: the products pass 64 bits with some 50,000 examples.
    missing = (examples - answered).astype(float)
    given, true = answers.astype(float), support.astype(float)
    spread = (examples**2 - (given**2).sum(1) - missing**2) * (examples**2 - (true**2).sum(1))
    return {
        "accuracy": right / examples,
        **headline,
        "f1_macro": ratio(f1.sum(1), seen.sum(1)),
        "f1_micro": 2 * right / (answered + examples),
        "matthews": ratio(right * examples - (given * true).sum(1), np.sqrt(spread)),
    }


def ratio(part: Any, whole: Any) -> Any:
    """The one by the other, 0 where the other is 0."""
    return np.divide(part, whole, out=np.zeros(whole.shape), where=whole != 0)
