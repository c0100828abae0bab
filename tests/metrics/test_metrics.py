"""Metrics equal what the field's own tools say, and their intervals hold what they promise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import sacrebleu
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from hpcft.core.records import DataSpec
from hpcft.metrics import (
    classification_names,
    compute_metric,
    merge_scores,
    metric_values,
    overlap_names,
    squad_names,
)
from hpcft.metrics.bootstrap import mean_values, with_intervals
from hpcft.metrics.facts import FACTS, arrow, lower_is_better, metric_info
from hpcft.tasks.classification import Classification
from hpcft.tasks.few_shot.task import FewShot
from hpcft.tasks.instruction import Instruction
from hpcft.tasks.pretraining import Pretraining
from hpcft.tasks.question_answering import QuestionAnswering

DATA = DataSpec(files={"train": "x.jsonl"})
NAMES = ["a", "b", "c", "d"]

# ---------------------------------------------------------------- classification


def classified(pairs: list[tuple[int, int | None]], labels: int) -> dict[str, Any]:
    """Scores of pairs of true and given label."""
    truth, given_ = zip(*pairs, strict=True)
    return compute_metric(
        "classification", predictions=given_, references=truth, labels=NAMES[:labels]
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
def test_classification_equals_scikit_learn(case: tuple[int, list[tuple[int, int]]]) -> None:
    number, pairs = case
    found = classified(pairs, number)
    truth, answers = zip(*pairs, strict=True)
    seen = sorted({*truth, *answers} - {-1})
    each = sklearn.metrics.precision_recall_fscore_support(
        truth, answers, labels=seen, zero_division=0
    )
    wanted = {
        "accuracy": sklearn.metrics.accuracy_score(truth, answers),
        "f1_macro": each[2].mean(),
        "f1_micro": sklearn.metrics.f1_score(
            truth, answers, labels=seen, average="micro", zero_division=0
        ),
        "matthews": sklearn.metrics.matthews_corrcoef(truth, answers),
        **{f"precision[{NAMES[i]}]": v for i, v in zip(seen, each[0], strict=True)},
        **{f"recall[{NAMES[i]}]": v for i, v in zip(seen, each[1], strict=True)},
        **{f"f1[{NAMES[i]}]": v for i, v in zip(seen, each[2], strict=True)},
    }
    if number > 2:
        means = zip(("precision", "recall", "f1"), each, strict=False)
        wanted |= {name: column.mean() for name, column in means}
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-12)
    assert set(metric_values(found)) <= set(classification_names(NAMES[:number]))
    counts = sklearn.metrics.confusion_matrix(truth, answers, labels=range(number))
    assert [row[:number] for row in found["confusion"]["counts"]] == counts.tolist()


def test_matthews_by_hand() -> None:
    """Matthews 1975: (tp·tn - fp·fn) / √((tp+fp)(tp+fn)(tn+fp)(tn+fn))."""
    tp, tn, fp, fn = 6, 3, 1, 2
    pairs = [(1, 1)] * tp + [(0, 0)] * tn + [(0, 1)] * fp + [(1, 0)] * fn
    by_hand = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert classified(pairs, 2)["matthews"] == pytest.approx(by_hand)
    assert classified([(0, 1), (1, 1)], 2)["matthews"] == 0  # a constant answer says nothing


def test_no_answer_is_wrong_for_every_label() -> None:
    pairs: list[tuple[int, int | None]] = [(0, 0), (0, -1), (1, None), (1, 1)]
    found = classified(pairs, 2)
    assert found["accuracy"] == 0.5
    assert found["recall[a]"] == found["recall[b]"] == 0.5
    assert found["precision[a]"] == found["precision[b]"] == 1
    assert found["f1_micro"] == pytest.approx(2 / 3)  # precision 1, recall 1/2
    assert found["confusion"] == {"labels": ["a", "b"], "counts": [[1, 0, 1], [0, 1, 1]]}


def test_confusion_of_many_labels_is_left_out() -> None:
    labels = [str(i) for i in range(101)]
    found = compute_metric("classification", predictions=[1, 2], references=[1, 3], labels=labels)
    assert "confusion" not in found
    assert found["accuracy"] == 0.5


# ---------------------------------------------------------------- answers


def test_squad_equals_the_official_script() -> None:
    """What evaluate-v2.0.py says of these, with the scores as `na_prob` and a threshold of 0."""
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
    found = compute_metric(
        "squad",
        predictions=[{"answer": answer, "no_answer_score": doubt} for answer, _, doubt in rows],
        references=[{"answers": truth} for _, truth, _ in rows],
    )
    assert set(metric_values(found)) == set(squad_names(no_answers=True))
    official = {
        "exact": 50.0, "f1": 54.166666666666664, "HasAns_exact": 40.0,
        "HasAns_f1": 46.666666666666664, "NoAns_exact": 66.66666666666667,
        "NoAns_f1": 66.66666666666667, "best_exact": 50.0, "best_f1": 54.16666666666667,
    }  # fmt: skip
    assert {name: 100 * found[name] for name in official} == pytest.approx(official)
    assert (found["best_exact_thresh"], found["best_f1_thresh"]) == (-4.0, -0.5)


TEXTS = [
    ("the cat sat on the mat", ["the cat sat on a mat", "a cat was sitting on the mat"]),
    ("Norman conquests", ["the Norman conquest of England"]),
    ("", ["Paris"]),
    ("in the 10th century", ["in the 10th century", "the 10th", "10th century"]),
]


def test_overlap_equals_the_libraries() -> None:
    answers, truths = [text for text, _ in TEXTS], [truth for _, truth in TEXTS]
    found = compute_metric("text_overlap", predictions=answers, references=truths)
    first, second, third = [
        [truth[i] if i < len(truth) else None for truth in truths] for i in range(3)
    ]
    bleu = sacrebleu.corpus_bleu(answers, [first, second, third])
    assert found["bleu"] == pytest.approx(bleu.score / 100)
    assert 0.3 < found["bleu"] < 1
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for name in ("rouge1", "rouge2", "rougeL"):
        each = [
            max(scorer.score(truth, text)[name].fmeasure for truth in wanted)
            for text, wanted in TEXTS
        ]
        assert found[name] == pytest.approx(sum(each) / len(each))
    assert set(metric_values(found)) == set(overlap_names())


def test_meteor_by_hand() -> None:
    """Lavie and Agarwal 2007: F weighs recall 9 to 1; half of (chunks / matches)³ is taken off."""
    cases = [
        ("the cat sat", "the cat sat", 1 - 0.5 * (1 / 3) ** 3),  # one chunk of three
        ("sat the cat", "the cat sat", 1 - 0.5 * (2 / 3) ** 3),
        ("conquests", "conquest", 1 - 0.5),  # the same stem
        ("feline", "cat", 0),  # a synonym: not known here
        ("the cat", "the cat sat down", 10 * 1 * 0.5 / (0.5 + 9 * 1) * (1 - 0.5 * (1 / 2) ** 3)),
    ]
    for text, truth, wanted in cases:
        found = compute_metric("text_overlap", predictions=[text], references=[[truth]])
        assert found["meteor"] == pytest.approx(wanted), text


def test_overlap_is_over_the_questions_that_have_an_answer() -> None:
    """And over the text that is really answered: nothing, where "no answer" outscores it."""
    task = QuestionAnswering(name="question_answering", data=DATA, version_2_with_negative=True,
                             n_best_size=1)  # fmt: skip
    answered = {"context": "x Paris", "answers": [(2, "Paris")], "rows": [{"offsets": SPANS}]}
    nothing = {"context": "x Paris", "answers": [], "rows": [{"offsets": SPANS}]}
    spans = [[[1, 0], [3.0, -5.0]], [[1, 0], [3.0, -5.0]]]  # the second token; its score, null's
    turned = [[[1, 0], [3.0, 9.0]], [[1, 0], [3.0, 9.0]]]
    found = task.metrics(np.array([spans, turned, spans]), None, [answered, answered, nothing])
    assert found["HasAns_exact"] == 0.5
    assert found["rougeL"] == 0.5
    assert set(metric_values(found)) == set(task.metric_names())
    assert "rougeL" not in task.metrics(np.array([spans]), None, [nothing])


SPANS = [None, [2, 7]]


# ---------------------------------------------------------------- perplexity


def test_perplexity_is_of_all_tokens_not_of_batches() -> None:
    """Three examples of 1, 2 and 5 tokens whose probabilities are known."""
    probabilities = [[0.5], [0.25, 0.125], [0.5, 0.5, 0.25, 1.0, 0.1]]
    losses = [-sum(map(math.log, each)) for each in probabilities]
    found = compute_metric(
        "perplexity", predictions=losses, references=[1, 2, 5], loss="masked_loss"
    )
    product = math.prod(p for each in probabilities for p in each)
    assert found["perplexity"] == pytest.approx(product ** (-1 / 8))
    assert found["masked_loss"] == pytest.approx(-math.log(product) / 8)
    reduced = np.array([[losses[i], tokens, 1, i % 2] for i, tokens in enumerate((1, 2, 5))])
    task = Pretraining(name="pretraining", data=DATA)
    scores = task.metrics(reduced.astype("float32"), None, [])
    assert scores["perplexity"] == pytest.approx(product ** (-1 / 8), rel=1e-6)
    assert scores["masked_accuracy"] == 3 / 8
    assert scores["next_sentence_accuracy"] == pytest.approx(1 / 3)
    assert set(metric_values(scores)) == set(task.metric_names())


# ---------------------------------------------------------------- intervals


def test_intervals_are_the_same_each_time_and_hold_the_value() -> None:
    pairs = [(i % 3, (i + (i % 5 == 0)) % 3) for i in range(200)]
    first, second = classified(pairs, 3), classified(pairs, 3)
    assert first == second
    assert set(first["intervals"]) == {"accuracy", "precision", "recall", "f1", "f1_macro",
                                       "f1_micro", "matthews"}  # fmt: skip
    for name, (low, high) in first["intervals"].items():
        assert low < first[name] < high
    low, high = first["intervals"]["accuracy"]
    half = 1.96 * math.sqrt(0.8 * 0.2 / 200)  # of the normal distribution: a textbook's interval
    assert (low, high) == pytest.approx((0.8 - half, 0.8 + half), abs=0.01)


def test_intervals_cover_the_truth() -> None:
    """Of 200 samples with a true mean of 0.7, about 95 % of the intervals hold it."""
    draw = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        sample = (draw.random(80) < 0.7).astype(float)
        low, high = with_intervals(80, mean_values({"x": sample}))["intervals"]["x"]
        held += low <= 0.7 <= high
    assert 180 <= held <= 199


def test_one_example_has_no_width_and_large_splits_come_in_parts() -> None:
    assert with_intervals(1, mean_values({"x": [0.25]})) == {
        "x": 0.25, "intervals": {"x": (0.25, 0.25)}
    }  # fmt: skip
    sizes = []

    def seen(drawn: Any) -> dict[str, Any]:
        sizes.append(drawn.shape)
        return {"x": drawn.mean(axis=1)}

    with_intervals(3000, seen)
    assert sizes == [(333, 3000), (333, 3000), (333, 3000), (1, 3000), (1, 3000)]


def test_joined_keeps_all_intervals() -> None:
    one, other = {"x": 1.0, "intervals": {"x": (0, 1)}}, {"y": 2.0, "intervals": {"y": (1, 2)}}
    assert merge_scores(one, other) == {"x": 1.0, "y": 2.0, "intervals": {"x": (0, 1), "y": (1, 2)}}


# ---------------------------------------------------------------- facts


def test_every_metric_of_every_task_has_its_fact() -> None:
    template = {"prompt": "{text}", "completion": "{label}"}
    tasks = [
        Classification(name="classification", data=DATA, labels=["a", "b"]),
        QuestionAnswering(name="question_answering", data=DATA, version_2_with_negative=True),
        Pretraining(name="pretraining", data=DATA),
        Instruction(name="instruction", data=DATA, choices=["a", "b"], **template),
        FewShot(name="prompting", data=DATA, prompt="{text}", labels=["a", "b"],
                  answer="generation"),
    ]  # fmt: skip
    known = {name for task in tasks for name in task.metric_names()}
    assert [name for name in known if metric_info(name) is None] == []
    general = {name.split("[")[0] + "[]" if "[" in name else name for name in known}
    assert set(FACTS) == general | {"loss"}


def test_direction() -> None:
    assert [lower_is_better(name) for name in ("loss", "perplexity", "accuracy", "odd")] == [
        True, True, False, False
    ]  # fmt: skip
    assert [arrow(name) for name in ("recall[a]", "no_answer", "majority", "recipe")] == [
        "↑", "↓", "", ""
    ]  # fmt: skip
