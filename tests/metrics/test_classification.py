"""Classification metrics equal scikit-learn's and hand computations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcft.metrics import compute_metric, metric_values
from hpcft.metrics.classification import classification_names

NAMES = ["a", "b", "c", "d"]


def scores_of(pairs: list[tuple[int, int | None]], labels: int, **options: bool) -> dict[str, Any]:
    """Returns the scores of pairs of true and predicted label."""
    truth, predicted = zip(*pairs, strict=True)
    return compute_metric(
        "classification", predictions=predicted, references=truth, labels=NAMES[:labels], **options
    )


@pytest.mark.filterwarnings("ignore:A single label was found:UserWarning")
@settings(max_examples=15, deadline=None)
@given(
    st.integers(2, 4).flatmap(
        lambda n: st.tuples(
            st.just(n),
            st.lists(st.tuples(st.integers(0, n - 1), st.integers(-1, n - 1)), min_size=1),
        )
    )
)
def test_compute_scores_equals_scikit_learn(case: tuple[int, list[tuple[int, int]]]) -> None:
    number, pairs = case
    scores = scores_of(pairs, number)
    truth, predicted = zip(*pairs, strict=True)
    seen = sorted({*truth, *predicted} - {-1})
    by_label = sklearn.metrics.precision_recall_fscore_support(
        truth, predicted, labels=seen, zero_division=0
    )
    wanted = {
        "accuracy": sklearn.metrics.accuracy_score(truth, predicted),
        "f1_macro": by_label[2].mean(),
        "f1_micro": sklearn.metrics.f1_score(
            truth, predicted, labels=seen, average="micro", zero_division=0
        ),
        "matthews": sklearn.metrics.matthews_corrcoef(truth, predicted),
        **{f"precision[{NAMES[i]}]": v for i, v in zip(seen, by_label[0], strict=True)},
        **{f"recall[{NAMES[i]}]": v for i, v in zip(seen, by_label[1], strict=True)},
        **{f"f1[{NAMES[i]}]": v for i, v in zip(seen, by_label[2], strict=True)},
    }
    if number > 2:
        means = zip(("precision", "recall", "f1"), by_label, strict=False)
        wanted |= {name: column.mean() for name, column in means}
    assert {name: scores[name] for name in wanted} == pytest.approx(wanted, abs=1e-12)
    assert set(metric_values(scores)) <= set(classification_names(NAMES[:number]))
    counts = sklearn.metrics.confusion_matrix(truth, predicted, labels=range(number))
    assert [row[:number] for row in scores["confusion"]["counts"]] == counts.tolist()


def test_matthews_equals_a_hand_computation() -> None:
    """Matthews 1975: (tp·tn - fp·fn) / √((tp+fp)(tp+fn)(tn+fp)(tn+fn))."""
    tp, tn, fp, fn = 6, 3, 1, 2
    pairs: list[tuple[int, int | None]] = [(1, 1)] * tp + [(0, 0)] * tn + [(0, 1)] * fp
    pairs += [(1, 0)] * fn
    by_hand = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert scores_of(pairs, 2)["matthews"] == pytest.approx(by_hand)
    assert scores_of([(0, 1), (1, 1)], 2)["matthews"] == 0  # a constant prediction


def test_prediction_without_answer_is_wrong_for_every_label() -> None:
    pairs: list[tuple[int, int | None]] = [(0, 0), (0, -1), (1, None), (1, 1)]
    scores = scores_of(pairs, 2, allows_no_answer=True)
    assert scores["accuracy"] == 0.5
    assert scores["recall[a]"] == scores["recall[b]"] == 0.5
    assert scores["precision[a]"] == scores["precision[b]"] == 1
    assert scores["f1_micro"] == pytest.approx(2 / 3)  # precision 1, recall 1/2
    assert scores["confusion"] == {"labels": ["a", "b"], "counts": [[1, 0, 1], [0, 1, 1]]}
    assert scores["no_answer"] == 0.5
    assert "no_answer" not in scores_of(pairs, 2)


def test_confusion_matrix_of_over_100_labels_is_left_out() -> None:
    labels = [str(i) for i in range(101)]
    scores = compute_metric("classification", predictions=[1, 2], references=[1, 3], labels=labels)
    assert "confusion" not in scores
    assert scores["accuracy"] == 0.5
