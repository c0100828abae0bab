"""Checks instruction tuning: templates filled from rows, tokens and labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import write_rows
from hpcft.core.errors import InputError
from hpcft.tasks.base import IGNORE_INDEX, BadRow
from hpcft.tasks.data import examples
from hpcft.tasks.instruction import Instruction


def instruction(data: dict[str, Any] | None = None, **options: Any) -> Instruction:
    made = {"name": "instruction", "prompt": "Q: {q}\nA:", "completion": " {a}", **options}
    files = data or {"files": {"train": "/nowhere.jsonl"}}
    return Instruction.model_validate_json(json.dumps({**made, "data": files}))


# ---------------------------------------------------------------- prompts and completions


def test_parse_row_fills_templates_from_any_column_name() -> None:
    task = instruction(prompt="{{{a.b}}} {x y} {评论} {c[0]} {x y}", completion="{$(z)}")
    row = {"a.b": "{q}", "x y": "2", "评论": "三", "c[0]": 4, "$(z)": "%s {}"}
    assert task.columns() == ["a.b", "x y", "评论", "c[0]", "$(z)"]
    assert task.parse_row(row) == {"prompt": "{{q}} 2 三 4 2", "completion": "%s {}"}


@pytest.mark.parametrize(
    ("field", "template", "what"),
    [
        ("prompt", "{q", "malformed"),
        ("prompt", "q}", "malformed"),
        ("completion", "{}", "plain {column} fields"),
        ("completion", "{q!r}", "plain {column} fields"),
        ("prompt", "{q:>5}", "plain {column} fields"),
        ("prompt", "", "at least 1 character"),
    ],
)
def test_template_malformed_names_its_field(field: str, template: str, what: str) -> None:
    from pydantic import ValidationError

    with pytest.raises(ValidationError) as error:
        instruction(**{field: template})
    (detail,) = error.value.errors()
    assert detail["loc"] == (field,)
    assert what in detail["msg"]


def test_load_examples_unknown_column_names_known_ones(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"question": "x", "a": "y"}])
    with pytest.raises(
        InputError, match=r":1 q: there is no such column; the row has: question, a$"
    ):
        examples.load_examples(instruction({"files": {"train": str(path)}}))


def test_load_examples_completion_outside_choices_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"q": "x", "a": 1}, {"q": "x", "a": "3"}])
    task = instruction({"files": {"train": str(path)}}, choices=[" 1", " 2"])
    with pytest.raises(InputError) as error:
        examples.load_examples(task)
    (problem,) = error.value.problems
    assert (problem.where, problem.key) == (f"{path}:2", "a")
    assert problem.what == "expected a completion among  1,  2, got ' 3'"
    with pytest.raises(ValueError, match="a is listed more than once"):
        instruction(choices=["a", "a"])


def test_parse_row_alpaca_row_without_input_takes_the_other_prompt() -> None:
    task = instruction(
        prompt="### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        prompt_when_empty="### Instruction:\n{instruction}\n\n### Response:\n",
        completion="{output}",
    )
    assert task.columns() == ["instruction", "input", "output"]
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    assert task.parse_row(row)["prompt"] == (
        "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n"
    )
    for empty in ("", "  ", None):
        found = task.parse_row({**row, "input": empty})
        assert found["prompt"] == "### Instruction:\nAdd.\n\n### Response:\n"
    with pytest.raises(BadRow, match="the text is empty"):
        task.parse_row({**row, "instruction": ""})


def test_parse_row_optional_column_may_be_empty() -> None:
    task = instruction(prompt="{q}{hint?}?", completion="{a}")
    assert task.columns() == ["q", "hint", "a"]
    assert task.parse_row({"q": "x", "hint": " y", "a": "b"})["prompt"] == "x y?"
    for empty in ("", "  ", None):
        assert task.parse_row({"q": "x", "hint": empty, "a": "b"})["prompt"] == "x?"
    with pytest.raises(BadRow, match="expected text"):
        task.parse_row({"q": "x", "hint": ["y"], "a": "b"})


def test_parse_row_choices_are_filled_from_each_row() -> None:
    """Winogrande's columns: the answer is the number of an option."""
    task = instruction(
        prompt="{sentence}", completion=None, choices=[" {option1}", " {option2}"],
        label="answer", labels=["1", "2"],
    )  # fmt: skip
    assert task.problems() == []
    assert task.columns() == ["sentence", "option1", "option2", "answer"]
    row = {"sentence": "It is", "option1": "a cat", "option2": "a dog", "answer": "2"}
    assert task.parse_row(row) == {
        "prompt": "It is", "completion": " a dog", "choices": [" a cat", " a dog"]
    }  # fmt: skip
    by_index = instruction(
        prompt="{sentence}", completion=None, choices=[" {option1}", " {option2}"], label="answer"
    )
    assert by_index.parse_row({**row, "answer": 0})["completion"] == " a cat"
    with pytest.raises(BadRow, match=r"two of task\.choices are ' a cat'"):
        task.parse_row({**row, "option2": "a cat"})
    with pytest.raises(BadRow, match="the text is empty"):
        task.parse_row({**row, "option2": ""})
    named = instruction(prompt="{q}", completion="{a}", choices=["{x}", "{y}"])
    assert named.parse_row({"q": "?", "a": "no", "x": "yes", "y": "no"})["completion"] == "no"
    with pytest.raises(BadRow, match="expected a completion among yes, no, got 'none'"):
        named.parse_row({"q": "?", "a": "none", "x": "yes", "y": "no"})


def test_choices_of_each_row_are_scored_and_counted(tokenizer: Any) -> None:
    task = instruction(
        prompt="{q}", completion=None, choices=[" {x}", " {y}"], label="a", labels=["1", "2"]
    )
    rows = [{"q": "Q:", "x": "four", "y": "legs", "a": "1"},
            {"q": "Q:", "x": "horse", "y": "how many", "a": "2"}]  # fmt: skip
    parsed = [task.parse_row(row) for row in rows]
    texts = []
    for example in parsed:
        for row in task.scoring_features(example, tokenizer):
            texts.append(tokenizer.decode([i for i in row["labels"] if i != IGNORE_INDEX]))
    assert texts == [" four", " legs", " horse", " how many"]
    reduced = np.array([[-1.0, 1], [-2, 1], [-1, 1], [-2, 2]])
    metrics = task.compute_metrics(reduced, None, parsed)
    assert metrics["accuracy"] == 0.5
    assert metrics["recall[1]"] == 1
    assert metrics["completion_loss"] == pytest.approx((1 + 2) / 3)
    assert set(metrics) >= set(task.metric_names())


@pytest.mark.parametrize(
    ("options", "field", "what"),
    [
        ({"completion": None}, "completion", "is required"),
        ({"label": "a", "choices": ["x", "y"]}, "completion", "given by label already"),
        ({"label": "a", "completion": None}, "choices", "is required with label"),
        ({"labels": ["1", "2"]}, "labels", "applies to label only"),
        ({"label": "a", "completion": None, "choices": ["x", "y"], "labels": ["1", "2", "3"]},
         "labels", "expected one for each of 2 choices, got 3"),
    ],
)  # fmt: skip
def test_problems_names_fields_that_contradict(
    options: dict[str, Any], field: str, what: str
) -> None:
    found = instruction(**options).problems()
    assert any(key == field and what in text for key, text, _ in found)


def test_new_fields_that_are_not_set_leave_the_recipe_as_it_was() -> None:
    """The id of a run is a hash of the recipe: those of earlier versions stay what they were."""
    names = {"prompt_when_empty", "label", "labels"}
    assert not names & instruction().model_dump(mode="json").keys()
    assert names & instruction(label="a").model_dump(mode="json").keys() == {"label"}


# ---------------------------------------------------------------- tokens


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A byte-level BPE tokenizer that merges words with the space before them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        ["Q: how many legs has a horse\nA: four legs"] * 20,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def with_bos(tokenizer: Any) -> Any:
    """The same tokenizer with a start token in front, like Llama's."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.bos_token_id)]
    )
    return made


@pytest.mark.parametrize(
    "completion", [" four legs", "four", " 四条腿 🐎", " e\u0301", "\n", " </s>x", " a " * 50]
)
@pytest.mark.parametrize("kind", ["tokenizer", "with_bos"])
def test_training_features_labels_exactly_the_completion(
    kind: str, completion: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(kind)
    task = instruction(max_length=2048)
    prompt = "Q: how many legs has a horse 🐎\nA:"
    (features,) = task.training_features({"prompt": prompt, "completion": completion}, tokenizer)
    ids, labels = features["input_ids"], features["labels"]
    assert len(ids) == len(labels) == len(features["attention_mask"])
    start = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
    assert labels[:start] == [IGNORE_INDEX] * start
    assert labels[start:] == ids[start:], "no token of the completion is ignored"
    assert ids[-1] == tokenizer.eos_token_id
    decode = tokenizer.backend_tokenizer.decoder.decode
    tokens = tokenizer.convert_ids_to_tokens
    skip = 1 if kind == "with_bos" else 0
    assert decode(tokens(ids[skip:start])) == prompt
    assert decode(tokens(ids[start:-1])) == completion


def test_training_features_token_across_border_is_labelled(tokenizer: Any) -> None:
    task = instruction()
    example = {"prompt": "Q: how ma", "completion": "ny legs"}
    (features,) = task.training_features(example, tokenizer)
    kept = [label for label in features["labels"] if label != IGNORE_INDEX]
    assert tokenizer.decode(kept[:-1]).strip().startswith("many legs")


@pytest.mark.parametrize("kind", ["tokenizer", "with_bos"])
def test_training_features_long_prompt_loses_its_front(
    kind: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(kind)
    example = {"prompt": "start " + "how many legs " * 100 + "end:", "completion": " four legs"}
    (short,) = instruction(max_length=24).training_features(example, tokenizer)
    (whole,) = instruction(max_length=4096).training_features(example, tokenizer)
    assert len(short["input_ids"]) == 24
    first = 1 if kind == "with_bos" else 0
    assert (
        short["input_ids"][:first] == whole["input_ids"][:first] == [tokenizer.bos_token_id] * first
    )
    kept = 24 - first
    assert short["input_ids"][first:] == whole["input_ids"][-kept:]
    assert [i for i in short["labels"] if i != IGNORE_INDEX] == [
        i for i in whole["labels"] if i != IGNORE_INDEX
    ]


def test_training_features_long_completion_is_cut_at_its_end(tokenizer: Any) -> None:
    example = {"prompt": "how many legs has a horse", "completion": " four legs" * 50}
    (features,) = instruction(max_length=16).training_features(example, tokenizer)
    assert len(features["input_ids"]) == 16
    assert features["labels"][0] == IGNORE_INDEX, "something to predict the first token from"
    assert features["labels"][1:] == features["input_ids"][1:]


def test_scoring_features_puts_each_choice_after_same_prompt(tokenizer: Any) -> None:
    task = instruction(choices=[" four", " legs has"])
    example = {"prompt": "Q: how many\nA:", "completion": " four"}
    rows = task.scoring_features(example, tokenizer)
    scored = [[i for i in row["labels"] if i != IGNORE_INDEX] for row in rows]
    assert [tokenizer.decode(ids) for ids in scored] == task.choices
    prompts = [row["input_ids"][: row["labels"].count(IGNORE_INDEX)] for row in rows]
    assert prompts[0] == prompts[1]
    assert len(instruction().scoring_features(example, tokenizer)) == 1
