"""Checks shots, prompts and answers of the few-shot task by hand, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from builders import ASKED, write_rows
from hpcft.config import recipe
from hpcft.core.errors import DataError, InputError
from hpcft.tasks.base import BadRow, Example
from hpcft.tasks.data.examples import check_local_data
from hpcft.tasks.few_shot.task import NO_ANSWER, FewShot

QUESTION = "Review: {text}\nIt is "


def task_of(**options: Any) -> FewShot:
    made = {"name": "prompting", "prompt": QUESTION, "labels": ["bad", "good"],
            "data": {"files": {"train": "/nowhere.jsonl"}}, **options}  # fmt: skip
    return FewShot.model_validate_json(json.dumps(made))


def film(text: str, label: int, number: int = 1) -> Example:
    prompt = QUESTION.replace("{text}", text)
    return {"prompt": prompt, "label": label, "place": f"test.jsonl:{number}"}


def splits_of(train: int, test: int) -> dict[str, list[Example]]:
    """Makes films with labels in turn; no film is in two splits."""
    return {
        "train": [film(f"a film, number {n}", n % 2) for n in range(train)],
        "test": [film(f"a play, number {n}{' indeed' * (n % 7)}", n % 2, n + 1)
                 for n in range(test)],
    }  # fmt: skip


# ---------------------------------------------------------------- shots


@pytest.mark.parametrize("shots", [0, 1, 4, 5, 8])
def test_draw_shots_is_balanced_and_depends_on_seed(shots: int) -> None:
    splits = splits_of(40, 6)
    task = task_of(shots=shots)
    drawn = {seed: task.draw_shots(splits, "test", seed) for seed in range(20)}
    for examples in drawn.values():
        labels = [example["label"] for example in examples]
        assert len(labels) == shots
        assert abs(labels.count(0) - labels.count(1)) == shots % 2
        assert len({example["prompt"] for example in examples}) == shots
    assert drawn[3] == task.draw_shots(splits, "test", 3)
    if shots % 2:  # either label may get one more
        assert {sum(e["label"] for e in examples) for examples in drawn.values()} == {
            shots // 2, shots // 2 + 1,
        }  # fmt: skip
    if shots:
        assert len({json.dumps(examples) for examples in drawn.values()}) > 15


def test_draw_shots_never_shows_scored_questions() -> None:
    """Questions count as the same if they differ in blanks and case only."""
    asked = [film("The Same", n % 2) for n in range(2)]
    train = [film(" the  same ", n % 2) for n in range(6)] + [film("other", 0), film("another", 1)]
    task = task_of(shots=2)
    for seed in range(10):
        shown = task.draw_shots({"train": train, "test": asked}, "test", seed)
        assert {example["prompt"] for example in shown} == {
            film("other", 0)["prompt"], film("another", 1)["prompt"],
        }  # fmt: skip
    with pytest.raises(DataError, match=r"4 shots of 2 labels need 2 examples labelled .*; "
                       r"without those that are scored, the train split has 1; lower"):  # fmt: skip
        task_of(shots=4).draw_shots({"train": train, "test": asked}, "test", 0)


# ---------------------------------------------------------------- choices of each row


def test_build_prompts_fills_choices_from_each_row(tokenizer: Any) -> None:
    """Winogrande's columns; a shot shows its own right option."""
    task = task_of(prompt="{sentence} It is ", label="answer", labels=["1", "2"], shots=2,
                   choices=["{option1}.", "{option2}."])  # fmt: skip
    assert task.columns() == ["sentence", "option1", "option2", "answer"]

    def rows(noun: str) -> list[Example]:
        return [
            {**task.parse_row({"sentence": f"{noun} {n}.", "option1": f"cat {n}",
                               "option2": f"dog {n}", "answer": str(1 + n % 2)}), "place": "x:1"}
            for n in range(4)
        ]  # fmt: skip

    splits = {"train": rows("Shown"), "test": rows("Asked")}
    shots = task.draw_shots(splits, "test", 0)
    for number, prompt in enumerate(task.build_prompts(splits, "test", tokenizer, 0)):
        text = tokenizer.decode(prompt.request.tokens)
        answers = [tokenizer.decode(choice) for choice in prompt.request.choices]
        assert answers == [f" cat {number}.", f" dog {number}."]
        for shot in shots:
            assert shot["prompt"] + shot["choices"][shot["label"]] in text
    with pytest.raises(BadRow, match=r"two of task\.choices are 'cat'"):
        task_of(choices=["{x}", "{y}"]).parse_row({"text": "a", "label": 0, "x": "cat", "y": "cat"})


# ---------------------------------------------------------------- prompts and their window


def test_build_prompts_joins_preamble_shots_and_question(tokenizer: Any) -> None:
    splits = splits_of(8, 3)
    task = task_of(shots=2, preamble="Films.\n\n", separator="\n---\n")
    first, second = task.draw_shots(splits, "test", 5)
    prompts = task.build_prompts(splits, "test", tokenizer, 5)
    for prompt, example in zip(prompts, splits["test"], strict=True):
        text = (
            f"Films.\n\n{first['prompt']}{task.labels[first['label']]}\n---\n"
            f"{second['prompt']}{task.labels[second['label']]}\n---\n{example['prompt']}"
        )
        assert prompt.shots == 2
        assert tokenizer.decode(prompt.request.tokens) == text.rstrip()
        # The blank that ends the prompt belongs to the answer.
        assert [tokenizer.decode(c) for c in prompt.request.choices] == [" bad", " good"]


def test_build_prompts_too_long_drops_last_shots_first(tokenizer: Any) -> None:
    splits = splits_of(20, 6)
    splits["test"][1] = film("long " * 25, 0)
    splits["test"][4] = film("longer " * 25, 1)
    window = 240
    task = task_of(shots=6, max_length=window)
    shots = task.draw_shots(splits, "test", 0)
    prompts = task.build_prompts(splits, "test", tokenizer, 0)
    kept = [prompt.shots for prompt in prompts]
    assert kept[4] < kept[1] < kept[0] < 6
    for prompt, example in zip(prompts, splits["test"], strict=True):
        text = tokenizer.decode(prompt.request.tokens)
        assert text.endswith(example["prompt"].rstrip()), "the question is never cut"
        shown = [s["prompt"] + task.labels[s["label"]] for s in shots[: prompt.shots + 1]]
        assert text.startswith("\n\n".join(shown[: prompt.shots]))
        one_more = len(prompt.request.tokens) + len("\n\n" + shown[-1]) + len(" good")
        assert len(prompt.request.tokens) + len(" good") <= window < one_more
    (answers, shortened) = task.describe_prompts(prompts, 0)
    assert answers.startswith("6-shot, shots drawn by seed 0, the likeliest choice counts")
    counts = ", ".join(f"{kept.count(n)} with {n}" for n in sorted(set(kept), reverse=True))
    assert shortened == (
        f"6 of 6 prompts exceed max_length {window} with 6 shots and show fewer: {counts}"
    )


def test_build_prompts_question_too_long_names_its_row(tokenizer: Any) -> None:
    splits = splits_of(4, 3)
    splits["test"][1] = film("very " * 30 + "long", 0, number=2)
    with pytest.raises(InputError) as error:
        task_of(max_length=100).build_prompts(splits, "test", tokenizer, 0)
    (problem,) = error.value.problems
    assert str(problem) == (
        "test.jsonl:2 text: the question alone takes 173 tokens with its answer, the window is "
        "100; raise task.max_length as far as the model allows, or remove the row"
    )  # fmt: skip


# ---------------------------------------------------------------- wrong data and recipes


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"text": "a", "label": "ugly"}, {}, "test.jsonl:2 label: expected one of bad, good"),
        (
            {"text": "a", "label": -1},
            {},
            "test.jsonl:2 label: the row has no label (-1, as in GLUE",
        ),
        ({"text": " ", "label": 1}, {}, "test.jsonl:2 text: the text is empty"),
        ({"text": "a"}, {}, "test.jsonl:2 label: there is no such column; the row has: text"),
        ({}, {"prompt": "{txt}?"}, "test.jsonl:1 txt: there is no such column"),
        ({"text": "a", "label": 1}, {"shots": 6}, "6 shots of 2 labels need 3 examples labelled"),
    ],
)
def test_check_local_data_refuses_unusable_rows(
    tmp_path: Path, row: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    good = {"text": "fine", "label": "good"}
    train = [{"text": f"film {n}", "label": n % 2} for n in range(4)]
    files = {"train": str(write_rows(tmp_path / "train.jsonl", train)),
             "test": str(write_rows(tmp_path / "test.jsonl", [good, row or good]))}  # fmt: skip
    with pytest.raises((InputError, DataError)) as error:
        check_local_data(task_of(data={"files": files}, **options), "test")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "method.name=lora",
            "method.name: the task prompting trains nothing, but the method lora does",
        ),
        ("task.prompt=What?", "task.prompt: names no {column}"),
        ("task.prompt='{text'", "task.prompt: the template is malformed"),
        ("task.choices=[yes, no, maybe]", "task.choices: expected one for each of 2 labels, got 3"),
        (
            "task={answer: generation, choices: [Yes, 'yes ']}",
            "task.choices: two differ only in blanks or case",
        ),
        (
            "task={answer: generation, length_normalised: true}",
            "task.length_normalised: applies to answer: likelihood",
        ),
        (
            "task={answer: generation, choices: ['{x}', '{y}']}",
            "task.choices: name columns, but a generated answer",
        ),
        ("task.temperature=0.5", "task.temperature: applies to answer: generation"),
        ("evaluation.before=true", "evaluation.before: the method frozen trains nothing"),
        ("task.data={files: , path: a/b, splits: {test: test}}", "task.data: has no train split"),
    ],
)
@pytest.mark.usefixtures("asked")
def test_load_recipe_refuses_contradicting_fields(override: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        recipe.load_recipe("asked.yaml", [override])
    assert message in str(error.value)


@pytest.mark.usefixtures("asked")
def test_needed_splits_without_shots_is_empty(asked: Path) -> None:
    asked.write_text(ASKED.replace("train: train.jsonl, ", ""))
    (point,) = recipe.load_recipe("asked.yaml", ["task.shots=0"])
    assert point.recipe.task.needed_splits == ()
    grid = recipe.load_recipe(str(asked), ["task.data.files.train=train.jsonl",
                                     "sweep.grid={task.shots: [0, 1, 4, 8]}"])  # fmt: skip
    assert [point.recipe.task.model_dump()["shots"] for point in grid] == [0, 1, 4, 8]


def test_load_recipe_frozen_refuses_new_model(tiny: Path) -> None:
    with pytest.raises(
        InputError, match=r"model\.path: is required: a new model has learnt nothing"
    ):
        recipe.load_recipe(str(tiny), ["method.name=frozen"])


# ---------------------------------------------------------------- answers


def test_parse_answer_returns_choice_that_text_begins_with() -> None:
    task = task_of(labels=["e", "n", "c"], choices=["yes", "no", "not sure"], answer="generation")
    parsed = {" Yes, it does": 0, "no": 1, "NO.": 1, "not sure\n\nPremise:": 2, "yes\n\nno": 0}
    parsed |= dict.fromkeys(["nothing", "", "well, yes", "not"], NO_ANSWER)
    assert {text: task.parse_answer(text) for text in parsed} == parsed
    metrics = task.compute_metrics([0, 1, NO_ANSWER, NO_ANSWER], [0, 1, 2, 0], [])
    assert metrics["accuracy"] == 0.5
    assert metrics["no_answer"] == 0.5
    assert metrics["recall[c]"] == 0
    assert set(task.metric_names()) >= {"no_answer", "accuracy", "recall[e]"}


def test_most_likely_choice_with_and_without_normalisation() -> None:
    scores, tokens = [-2.0, -3.0], [1, 3]
    assert task_of().most_likely_choice(scores, tokens) == 0
    assert task_of(length_normalised=True).most_likely_choice(scores, tokens) == 1
    assert task_of().most_likely_choice([-1.0, -1.0], tokens) == 0, "of equal choices the first"
