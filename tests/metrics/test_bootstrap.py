"""Bootstrap intervals are reproducible, contain the value, and cover the truth as promised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats

from hpcft.metrics import bootstrap, classification, perplexity, pretraining, squad, text_overlap
from hpcft.metrics.base import Scores
from hpcft.metrics.bootstrap import with_intervals, with_mean_intervals

OVERALL = ("accuracy", "precision", "recall", "f1", "f1_macro", "f1_micro", "matthews")


def labelled(truth: Sequence[int], predicted: Sequence[int], number: int = 2) -> Scores:
    return classification.compute_scores(predicted, truth, [f"l{i}" for i in range(number)])


def test_intervals_are_reproducible_and_contain_the_value() -> None:
    truth = [i % 3 for i in range(200)]
    predicted = [(i + (i % 5 == 0)) % 3 for i in range(200)]
    first, second = (labelled(truth, predicted, 3) for _ in range(2))
    assert first == second
    assert set(first["intervals"]) == {*OVERALL}
    for name, (low, high) in first["intervals"].items():
        assert low < first[name] < high
    assert first["intervals"]["accuracy"] == pytest.approx(jeffreys(160, 200), abs=0.005)


def jeffreys(right: int, examples: int) -> tuple[float, float]:
    """The Jeffreys interval of a share (Brown, Cai and DasGupta 2001)."""
    low, high = stats.beta.interval(0.95, right + 0.5, examples - right + 0.5)
    return (low if right else 0.0, high if right < examples else 1.0)


@pytest.mark.parametrize(("right", "examples"), [(0, 20), (1, 20), (99, 100), (100, 100)])
def test_interval_of_a_share_is_that_of_jeffreys(right: int, examples: int) -> None:
    column = [1.0] * right + [0.0] * (examples - right)
    expected = pytest.approx(jeffreys(right, examples), abs=0.009)
    assert with_mean_intervals({"x": column})["intervals"]["x"] == expected
    truth, predicted = [1] * examples, [1] * right + [0] * (examples - right)
    assert labelled(truth, predicted)["intervals"]["accuracy"] == expected
    assert labelled(truth, predicted)["intervals"]["recall"] == expected
    assert labelled(predicted, truth)["intervals"]["precision"] == expected


@pytest.mark.parametrize("number", [2, 3, 20, 200])
def test_no_interval_of_a_faultless_sample_has_no_width(number: int) -> None:
    """Without an error among n examples, an error rate of 3 / n is still likely (rule of three)."""
    truth = [i % number for i in range(2 * number)] * 2
    scores = labelled(truth, truth, number)
    for name, (low, high) in scores["intervals"].items():
        assert scores[name] == pytest.approx(1)
        assert high == pytest.approx(1)
        assert 1 - 6 / len(truth) < low < 1 - 0.5 / len(truth), name


# ---------------------------------------------------------------- coverage, by simulation

Sample = Callable[[np.random.Generator, int], Scores]


def confused(matrix: Sequence[Sequence[float]]) -> Sample:
    """Draws true and predicted labels with these shares of all examples."""
    shares = np.array(matrix)

    def sample(dice: np.random.Generator, examples: int) -> Scores:
        kinds = dice.choice(shares.size, size=examples, p=shares.ravel())
        truth, predicted = np.divmod(kinds, shares.shape[1])
        return labelled(truth.tolist(), predicted.tolist(), len(shares))

    return sample


def questions(dice: np.random.Generator, examples: int) -> Scores:
    """Most answers are right, some in part, few wrong."""
    words = dice.choice(["a b c d", "a b c", "a b", "x"], p=[0.94, 0.03, 0.02, 0.01], size=examples)
    answers = [{"answer": str(w).replace("a ", "e "), "no_answer_score": 0.0} for w in words]
    return squad.compute_scores(answers, [{"answers": ["e b c d"]}] * examples)


def unanswerable(dice: np.random.Generator, examples: int) -> Scores:
    """A third of the questions has no answer, and few of them get one."""
    has = dice.random(examples) < 0.67
    answers = [
        {"answer": "b c" if right else "x", "no_answer_score": float(1 - 2 * (right == known))}
        for right, known in zip(dice.random(examples) < 0.97, has, strict=True)
    ]
    return squad.compute_scores(answers, [{"answers": ["b c"] * int(known)} for known in has])


def texts(dice: np.random.Generator, examples: int) -> Scores:
    words = dice.choice(["e b c d", "e b c", "x"], p=[0.96, 0.03, 0.01], size=examples)
    return text_overlap.compute_scores([*map(str, words)], [["e b c d"]] * examples)


def masked(dice: np.random.Generator, examples: int) -> Scores:
    tokens = dice.integers(3, 10, size=examples)
    losses = dice.gamma(2.0, 0.25, size=examples) * tokens
    return pretraining.compute_scores(
        [
            {"loss": loss, "tokens": count, "correct_tokens": dice.binomial(count, 0.97),
             "correct_pair": float(dice.random() < 0.98)}
            for loss, count in zip(losses, tokens, strict=True)
        ]
    )  # fmt: skip


def losses(dice: np.random.Generator, examples: int) -> Scores:
    tokens = dice.integers(1, 30, size=examples)
    return perplexity.compute_scores(dice.gamma(1.0, 0.8, size=examples) * tokens, tokens, "loss")


NEARLY_RIGHT = [[0.495, 0.005], [0.005, 0.495]]
RARE = [[0.89, 0.01], [0.02, 0.08]]
THREE = [[0.38, 0.01, 0.005], [0.005, 0.38, 0.005], [0.005, 0.01, 0.2]]
MEDIOCRE = [[0.3, 0.2], [0.15, 0.35]]
CASES = {
    "nearly right": (confused(NEARLY_RIGHT), OVERALL, 100),
    "rare": (confused(RARE), OVERALL, 150),
    "three": (confused(THREE), OVERALL, 120),
    "mediocre": (confused(MEDIOCRE), OVERALL, 60),
    "questions": (questions, ("exact", "f1"), 100),
    "unanswerable": (unanswerable, ("HasAns_exact", "NoAns_exact"), 150),
    "texts": (texts, ("rouge1", "rouge2", "rougeL", "meteor"), 60),
    "masked": (masked, ("masked_loss", "perplexity", "masked_accuracy",
                        "next_sentence_accuracy"), 60),
    "losses": (losses, ("loss", "perplexity"), 40),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_interval_of_every_metric_covers_the_truth(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 200 samples, about 190 have an interval with the truth in it; 178 are 4 deviations less.

    With the percentiles of the usual bootstrap, 130 of 200 cover an accuracy of 0.99.
    """
    sample, names, examples = CASES[case]
    monkeypatch.setattr(bootstrap, "DRAWS", (10, 10))
    truth = sample(np.random.default_rng(0), 20_000)
    monkeypatch.setattr(bootstrap, "DRAWS", (400, 400))
    dice = np.random.default_rng(1)
    covered = dict.fromkeys(names, 0)
    samples = 200
    for _ in range(samples):
        intervals = sample(dice, examples)["intervals"]
        assert {*names} <= intervals.keys()
        for name in names:
            low, high = intervals[name]
            covered[name] += low <= truth[name] <= high
    assert min(covered.values()) >= 178, covered


# ---------------------------------------------------------------- the edges


def test_interval_of_one_example_contains_what_is_possible() -> None:
    low, high = with_mean_intervals({"x": [0.25]})["intervals"]["x"]
    assert low < 0.25 < high
    unbounded = with_intervals(np.ones(1), lambda weights: {"x": weights @ np.array([0.25])})
    assert unbounded["intervals"]["x"] == pytest.approx((0.25, 0.25))


def test_large_splits_are_drawn_in_chunks() -> None:
    shapes = []

    def values(weights: Any) -> dict[str, Any]:
        shapes.append(weights.shape)
        assert np.allclose(weights.sum(1), 1)
        return {"x": weights[:, 0]}

    with_intervals(np.ones(9000), values)
    *whole, last, all_at_once = shapes
    assert whole == [(111, 9000)] * 10
    assert (last, all_at_once) == ((1, 9000), (1, 9000))


def test_sums_by_label_leaves_out_what_is_not_counted() -> None:
    weights = np.array([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
    sums = bootstrap.sums_by_label(weights, np.array([1, 3, 1, 0]), 3)
    assert np.allclose(sums, [[0.4, 0.4, 0.0], [0.1, 0.6, 0.0]])
