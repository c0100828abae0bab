"""SQuAD metrics equal the official script, and texts are scored over answerable questions."""

from __future__ import annotations

import numpy as np
import pytest

from hpcft.core.records import DataSpec
from hpcft.metrics import compute_metric, metric_values
from hpcft.metrics.squad import squad_names
from hpcft.tasks.question_answering import QuestionAnswering


def test_squad_equals_the_official_script() -> None:
    """The expected values are evaluate-v2.0.py's, with the scores as `na_prob`, threshold 0."""
    rows = [
        ("in France.", ["France", "France", "in France"], -4.0),
        ("10th century", ["10th and 11th centuries", "in the 10th and 11th centuries"], -1.5),
        ("the Frankish King Charles III", ["Rollo"], 2.5),
        ("", ["King Charles III"], 6.0),
        ("Denmark, Iceland and Norway", ["Denmark, Iceland and Norway", "Denmark, Iceland"], -0.5),
        ("Normandy", [], -2.0),
        ("Viking raiders", [], 1.0),
        ("", [], 3.0),
    ]
    scores = compute_metric(
        "squad",
        predictions=[{"answer": answer, "no_answer_score": score} for answer, _, score in rows],
        references=[{"answers": truth} for _, truth, _ in rows],
    )
    assert set(metric_values(scores)) == set(squad_names(no_answers=True))
    official = {
        "exact": 50.0, "f1": 54.166666666666664, "HasAns_exact": 40.0,
        "HasAns_f1": 46.666666666666664, "NoAns_exact": 66.66666666666667,
        "NoAns_f1": 66.66666666666667, "best_exact": 50.0, "best_f1": 54.16666666666667,
    }  # fmt: skip
    assert {name: 100 * scores[name] for name in official} == pytest.approx(official)
    assert (scores["best_exact_thresh"], scores["best_f1_thresh"]) == (-4.0, -0.5)


OFFSETS = [None, [2, 7]]


def test_text_overlap_is_computed_over_questions_that_have_an_answer() -> None:
    """The text is the final answer: empty, where "no answer" outscores the span."""
    data = DataSpec(files={"train": "x.jsonl"})
    task = QuestionAnswering(name="question_answering", data=data, version_2_with_negative=True,
                             n_best_size=1)  # fmt: skip
    answered = {"context": "x Paris", "answers": [(2, "Paris")], "rows": [{"offsets": OFFSETS}]}
    unanswerable = {"context": "x Paris", "answers": [], "rows": [{"offsets": OFFSETS}]}
    spans = [[[1, 0], [3.0, -5.0]], [[1, 0], [3.0, -5.0]]]  # the second token, and [CLS]'s score
    no_answer = [[[1, 0], [3.0, 9.0]], [[1, 0], [3.0, 9.0]]]
    reduced = np.array([spans, no_answer, spans])
    scores = task.compute_metrics(reduced, None, [answered, answered, unanswerable])
    assert scores["HasAns_exact"] == 0.5
    assert scores["rougeL"] == 0.5
    assert set(metric_values(scores)) == set(task.metric_names())
    assert "rougeL" not in task.compute_metrics(np.array([spans]), None, [unanswerable])
