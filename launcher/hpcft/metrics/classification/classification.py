"""Accuracy, precision, recall and F1 of a classifier: shares from 0 to 1, higher is better."""

import datasets
import evaluate
import sklearn.metrics

_DESCRIPTION = """\
All values are shares from 0 to 1; higher is better. `precision`, `recall` and `f1` are those of the
second label when there are two labels (the positive class) and unweighted means over the classes
otherwise; `f1_macro` is always that mean. `recall[label]` is the accuracy within one class,
`majority` the share of the most frequent label: what a constant answer would score.
"""


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
        indices = list(range(len(labels)))
        each = sklearn.metrics.precision_recall_fscore_support(
            references, predictions, labels=indices, zero_division=0
        )
        precision, recall, f1, support = (column.tolist() for column in each)
        seen = [index for index in indices if support[index] or index in predictions]
        if len(labels) == 2:
            headline = precision[1], recall[1], f1[1]
        else:
            headline = tuple(sum(c[i] for i in seen) / len(seen) for c in (precision, recall, f1))
        result = {
            "accuracy": sklearn.metrics.accuracy_score(references, predictions),
            "precision": headline[0],
            "recall": headline[1],
            "f1": headline[2],
            "f1_macro": sum(f1[i] for i in seen) / len(seen),
            "majority": max(support) / sum(support),
        }
        return result | {f"recall[{labels[i]}]": recall[i] for i in seen}
