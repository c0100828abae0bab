"""Checks question answering: windows over long contexts, best spans, SQuAD's scores."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from builders import Cli, write_rows
from hpcft.core.records import DataSpec, TokenizerTraining
from hpcft.metrics import compute_metric, metric_values
from hpcft.tasks.base import BadRow
from hpcft.tasks.question_answering import QuestionAnswering
from hpcft.training.data.tokenizer import train_tokenizer

DATA = DataSpec(files={"train": "x.jsonl"})


def task(**options: Any) -> QuestionAnswering:
    return QuestionAnswering(name="question_answering", data=DATA, **options)


def answers(*pairs: tuple[str, int]) -> dict[str, list[Any]]:
    return {"text": [text for text, _ in pairs], "answer_start": [start for _, start in pairs]}


# ---------------------------------------------------------------- SQuAD's scoring


def scores(*triples: tuple[str, list[str], float], threshold: float = 0.0) -> dict[str, float]:
    """Scores triples of answer, true answers and score of "no answer"."""
    computed = compute_metric(
        "squad",
        predictions=[{"answer": a, "no_answer_score": doubt} for a, _, doubt in triples],
        references=[{"answers": truth} for _, truth, _ in triples],
        threshold=threshold,
    )
    return metric_values(computed)


@pytest.mark.parametrize(
    ("answer", "truth", "exact", "f1"),
    [
        # Rajpurkar et al. 2016: punctuation and articles are ignored; the best of several counts.
        ("the Denver Broncos!", ["Denver Broncos", "Broncos"], 1, 1),
        ("A  theatre", ["theatre"], 1, 1),
        ("anthem", ["them"], 0, 0),  # an article is a word, not the start of one
        ("in the inner city", ["inner city"], 0, 0.8),  # 2 common: precision 2/3, recall 1
        ("two two", ["two"], 0, 2 / 3),  # a word counts as often as both have it
        ("U.S.A.", ["usa"], 1, 1),
        ("1976", ["1976-77"], 0, 0),  # what is left of the second is 197677
        ("", ["Paris"], 0, 0),
        ("the", ["the"], 1, 1),  # of an answer that is but an article nothing is left
    ],
)
def test_squad_one_answer(answer: str, truth: list[str], exact: float, f1: float) -> None:
    found = scores((answer, truth, 0.0))
    assert found == {"exact": exact, "f1": pytest.approx(f1)}


def test_squad_with_and_without_answers_by_hand() -> None:
    """Of four questions two have no answer; a score above the threshold means "no answer"."""
    found = scores(
        ("Normandy", ["Normandy", "in Normandy"], -3.0),  # right, sure
        ("10th century", ["10th and 11th centuries"], -1.0),  # 2 words, 4, of which 1 common
        ("Gaul", [], -2.0),  # has no answer, but is answered
        ("Rollo", [], 4.0),  # has no answer, and gets none
    )
    f1 = 2 * 1 / (2 + 4)
    assert found["exact"] == pytest.approx((1 + 0 + 0 + 1) / 4)
    assert found["f1"] == pytest.approx((1 + f1 + 0 + 1) / 4)
    assert found["HasAns_exact"] == 0.5
    assert found["HasAns_f1"] == pytest.approx((1 + f1) / 2)
    assert found["NoAns_exact"] == found["NoAns_f1"] == 0.5
    # Answering none gives 2 of 4; the surest one 3; with the next, that has no answer, 2 again.
    assert found["best_exact"] == 0.75
    assert found["best_exact_thresh"] == -3.0
    assert found["best_f1"] == 0.75
    strict = scores(("Normandy", ["Normandy"], -3.0), ("Gaul", [], -2.0), threshold=-2.5)
    assert strict["exact"] == 1


def test_squad_best_exact_of_empty_answers() -> None:
    """Empty answers score the share of questions without an answer (about half of SQuAD 2.0)."""
    wrong = (("wrong", ["right"], -5.0), ("wrong", [], -4.0), ("wrong", [], -3.0))
    found = scores(*wrong)
    assert found["best_exact"] == found["best_f1"] == pytest.approx(2 / 3)
    assert found["exact"] == 0, "the threshold of 0 answers all of them"
    assert found["best_exact_thresh"] == -6.0
    assert scores(*wrong, threshold=-6.0)["exact"] == found["best_exact"]
    huge = scores(("wrong", [], 1e30), ("wrong", [], 1e30))
    assert huge["best_exact_thresh"] < 1e30


@pytest.mark.parametrize("seed", range(20))
def test_squad_best_values_are_those_at_their_thresholds(seed: int) -> None:
    """No threshold gives more, and scoring at the best one gives what it promises."""
    draw = random.Random(seed)
    texts = ["a red house", "red", "the", "a green house", "house"]
    triples = [
        (draw.choice(texts), draw.sample(texts, draw.randrange(3)), draw.randrange(-4, 5) / 2)
        for _ in range(draw.randrange(1, 9))
    ] + [("red", [], 1.0)]
    found = scores(*triples)
    for name in ("exact", "f1"):
        at_best = scores(*triples, threshold=found[f"best_{name}_thresh"])
        assert at_best[name] == pytest.approx(found[f"best_{name}"])
        for step in range(-12, 13):
            tried = scores(*triples, threshold=step / 4)[name]
            assert tried <= found[f"best_{name}"] + 1e-9


# ---------------------------------------------------------------- rows to windows


def test_parse_row_takes_renamed_columns_and_json() -> None:
    renamed = task(question="Frage", context="Text", answers="Antworten")
    row = {"Frage": " who? ", "Text": "Ada did", "Antworten": json.dumps(answers(("Ada", 0)))}
    assert renamed.parse_row(row) == {
        "question": "who?",
        "context": "Ada did",
        "answers": [(0, "Ada")],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("found", "what", "fix"),
    [
        (answers(("did", 0)), "'did' is not at character 0", "it is at 4"),
        (answers(("Bob", 0)), "'Bob' is not at", "correct the row"),
        (answers(("d", -1)), "is not at character -1", "it is at 1"),
        (answers(), "the question has no answer", "version_2_with_negative"),
        (answers(("", 0)), "an answer is empty", "remove it"),
        ({"text": ["Ada"], "answer_start": []}, "expected {text", "the same length"),
        ("not json", "expected {text", ""),
        (None, "expected {text", ""),
    ],
)
def test_parse_row_bad_answer_is_refused(found: Any, what: str, fix: str) -> None:
    with pytest.raises(BadRow) as bad:
        task().parse_row({"question": "who?", "context": "Ada did", "answers": found})
    assert bad.value.problem.key == "answers"
    assert what in bad.value.problem.what
    assert fix in bad.value.problem.fix


def test_window_without_room_for_context_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves no room"):
        task(max_length=128, doc_stride=64, max_query_length=64)


CONTEXT = " ".join(f"word{i} stands here," for i in range(60)) + " and the key is Ünder the 📄 mat."
ANSWER = "Ünder the 📄 mat"
TOKENIZER = train_tokenizer(TokenizerTraining(vocab_size=400), [CONTEXT], causal=False)
LONG = task(max_length=64, doc_stride=16, max_query_length=16, n_best_size=4)
EXAMPLE = {
    "question": "where is the key? " * 9,
    "context": CONTEXT,
    "answers": [(CONTEXT.index(ANSWER), ANSWER)],
}


def test_scoring_features_windows_cover_context_and_answer() -> None:
    rows = LONG.scoring_features(EXAMPLE, TOKENIZER)
    assert len(rows) > 4
    assert all(len(row["input_ids"]) <= 64 for row in rows)
    seen = {c for row in rows for place in row["offsets"] if place for c in range(*place)}
    assert {i for i, c in enumerate(CONTEXT) if not c.isspace()} <= seen
    holding = [row for row in rows if row["labels"] != [0, 0]]
    assert holding
    for row in holding:
        (first, last), offsets = row["labels"], row["offsets"]
        assert CONTEXT[offsets[first][0] : offsets[last][1]].strip() == ANSWER
    shared = set(map(str, rows[0]["offsets"])) & set(map(str, rows[1]["offsets"])) - {"None"}
    assert len(shared) == 16
    questions = {tuple(row["input_ids"][: row["offsets"].count(None) - 1]) for row in rows}
    assert len(questions) == 1, "each window starts with the question"
    trained = LONG.training_features(EXAMPLE, TOKENIZER)
    assert [row["labels"] for row in trained] == [row["labels"] for row in rows]
    assert all("offsets" not in row for row in trained)


def _metrics(
    rows: list[dict[str, Any]], peaks: dict[int, tuple[int, int]], **options: Any
) -> dict[str, float]:
    """Computes metrics where window i favours span `peaks[i]`, and all else is equally unlikely."""
    answering = task(**{"max_length": 64, "doc_stride": 16, "max_query_length": 16} | options)
    length = max(len(row["input_ids"]) for row in rows) + 3  # padding
    starts, ends = torch.zeros(len(rows), length), torch.zeros(len(rows), length)
    for index, (first, last) in peaks.items():
        starts[index, first] = ends[index, last] = 5.0 + index
    labels = torch.tensor([row["labels"] for row in rows])
    reduced = answering.reduce_logits((starts, ends), labels).numpy()
    beside = [{"offsets": row["offsets"]} for row in rows]
    return answering.compute_metrics(reduced, labels.numpy(), [{**EXAMPLE, "rows": beside}])


def test_compute_metrics_takes_best_span_of_all_windows() -> None:
    rows = LONG.scoring_features(EXAMPLE, TOKENIZER)
    last = len(rows) - 1
    truth = tuple(rows[last]["labels"])
    found = _metrics(rows, {0: (30, 31), last: truth})
    assert (found["exact"], found["f1"], found["rougeL"]) == (1, 1, 1)
    assert _metrics(rows, {0: (30, 31)})["exact"] == 0
    # Spans in the question or the padding, with end before start, or too long, do not count.
    assert _metrics(rows, {0: (1, 2), last: truth[::-1]})["exact"] == 0
    assert _metrics(rows, {last: truth}, max_answer_length=2)["exact"] == 0
    length = len(rows[last]["input_ids"])
    assert _metrics(rows, {last: (length, length + 1)})["exact"] == 0


def test_compute_metrics_no_answer_takes_lowest_first_token_score() -> None:
    rows = LONG.scoring_features(EXAMPLE, TOKENIZER)
    truth = {len(rows) - 1: tuple(rows[-1]["labels"])}
    unsure = {index: (0, 0) for index in range(len(rows) - 1)}
    options = {"version_2_with_negative": True}
    assert _metrics(rows, {**unsure, **truth}, **options)["exact"] == 1
    sure = {index: (0, 0) for index in range(len(rows))}
    assert _metrics(rows, sure, **options)["exact"] == 0
    assert _metrics(rows, sure)["f1"] < 1


def test_loss_is_mean_of_start_and_end() -> None:
    torch.manual_seed(0)
    start, end = torch.randn(4, 9), torch.randn(4, 9)
    labels = torch.tensor([[1, 3], [0, 0], [2, 2], [5, 8]])
    ce = torch.nn.functional.cross_entropy
    expected = (ce(start, labels[:, 0]) + ce(end, labels[:, 1])) / 2
    whole = LONG.loss((start, end), labels, None, 0.0)
    items = labels.ne(-100).sum()  # as the Trainer counts
    parts = [LONG.loss((start[i], end[i]), labels[i], items, 0.0)
             for i in (slice(0, 3), slice(3, 4))]  # fmt: skip
    assert whole.item() == pytest.approx(expected.item())
    assert sum(parts).item() == pytest.approx(expected.item())


# ---------------------------------------------------------------- a real run


QA = """\
name: qa
model:
  config:
    model_type: bert
    vocab_size: 600
    hidden_size: 64
    num_hidden_layers: 2
    num_attention_heads: 4
    intermediate_size: 128
    max_position_embeddings: 64
    hidden_dropout_prob: 0.0
    attention_probs_dropout_prob: 0.0
  tokenizer: { vocab_size: 600, lowercase: true }
task:
  name: question_answering
  data: { files: { train: train.jsonl, test: test.jsonl } }
  max_length: 48
  doc_stride: 8
  max_query_length: 16
  version_2_with_negative: true
method: { name: full }
train:
  global_batch_size: 16
  max_steps: 150
  learning_rate: 3e-3
  warmup_steps: 0.1
resources: { gpus_per_node: 1, time_min: 10 }
"""
COLOURS = ["red", "green", "blue", "black", "white", "pink", "grey", "brown"]


def colour_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Makes questions about a colour that the context names, or not, among other sentences."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        colour, other = draw.choice(COLOURS), "another thing is here . "
        before, after = draw.randrange(4), draw.randrange(4)
        has_answer = draw.random() < 0.7
        middle = f"the colour was {colour} today . " if has_answer else "nothing was said . "
        context = other * before + middle + other * after
        found = [(colour, context.index(colour))] if has_answer else []
        rows.append(
            {"question": "what was the colour ?", "context": context, "answers": answers(*found)}
        )
    return rows


@pytest.mark.process
def test_submit_question_answering_learns_to_find_answers(workplace: Path, cli: Cli) -> None:
    write_rows(workplace / "train.jsonl", colour_rows(160, 0))
    write_rows(workplace / "test.jsonl", colour_rows(40, 1))
    (workplace / "qa.yaml").write_text(QA)
    done = cli("submit", "qa.yaml", "-c", "local", "--watch")
    assert done.code == 0, done.err
    (row,) = cli("collect", "--json").json
    metrics = {name: value["mean"] for name, value in row["metrics"].items()}
    assert metrics["HasAns_exact"] > 0.8
    assert metrics["NoAns_exact"] > 0.8
    assert metrics["best_exact"] >= metrics["exact"]
    assert row["trainable_parameters"] == row["total_parameters"]
