"""Checks tokens of prompts and choices for three families of tokenizers, each with quirks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from builders import FAMILIES, family_tokenizer
from hpcft.core.errors import DataError
from hpcft.core.records import DataSpec
from hpcft.tasks.base import IGNORE_INDEX
from hpcft.tasks.few_shot.requests import encode_prompt
from hpcft.tasks.few_shot.scorer import Scorer
from hpcft.tasks.few_shot.task import FewShot
from hpcft.tasks.instruction import Instruction
from hpcft.tasks.text_encoding import encode_choices, encode_texts

DATA = DataSpec(files={"train": "x.jsonl"})
PROMPT = "how many legs has a horse ?"


def instruction(*choices: str, **options: Any) -> Instruction:
    fields = {"name": "instruction", "data": DATA, "prompt": "{q}", "completion": "{a}"}
    return Instruction.model_validate({**fields, "choices": list(choices), **options})


def scored(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Returns the tokens before those that are scored, and these."""
    after = [label for label in row["labels"] if label != IGNORE_INDEX]
    return row["input_ids"][: len(row["input_ids"]) - len(after)], after


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ends", [False, True], ids=["open", "adds_end"])
@pytest.mark.parametrize("starts", [False, True], ids=["bare", "adds_start"])
def test_prompts_and_choices_have_no_end_token_and_one_start_token(
    family: str, ends: bool, starts: bool
) -> None:
    tokenizer = family_tokenizer(family, adds_start=starts, adds_end=ends)
    plain = family_tokenizer(family)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    choices = [" good", " bad"]
    for spelled in ("", "<s>"):
        prompt = spelled + PROMPT
        first = [start] * (starts or spelled != "")
        request = encode_prompt(tokenizer, prompt, choices)
        assert request.tokens[: len(first) + 1].count(start) == len(first)
        assert request.tokens[:1] == (first or request.tokens[:1])
        assert end not in [*request.tokens, *(i for ids in request.choices for i in ids)]
        assert len({*map(tuple, request.choices)}) == 2
        generated = encode_prompt(tokenizer, prompt, [])
        assert generated.tokens == request.tokens
        if not spelled:
            assert request.tokens == first + encode_prompt(plain, prompt, choices).tokens

        task = instruction(*choices)
        rows = task.scoring_features({"prompt": prompt, "completion": " good"}, tokenizer)
        assert [scored(row) for row in rows] == [(request.tokens, ids) for ids in request.choices]
        (trained,) = task.training_features({"prompt": prompt, "completion": " good"}, tokenizer)
        assert scored(trained) == (request.tokens, [*request.choices[0], end])


@pytest.mark.parametrize("family", FAMILIES)
def test_end_token_that_the_completion_spells_out_is_not_added_again(family: str) -> None:
    tokenizer = family_tokenizer(family)
    for completion in (" good</s>", " good"):
        example = {"prompt": PROMPT, "completion": completion}
        (row,) = instruction().training_features(example, tokenizer)
        assert row["labels"][-2:].count(tokenizer.eos_token_id) == 1


def test_choices_begin_before_a_token_that_reaches_across_the_seam() -> None:
    """The vocabulary has `(A` but no `(B`; every choice is scored after the same tokens."""
    tokenizer = family_tokenizer("bpe", merges=[("(", "A")])
    vocab = tokenizer.get_vocab()
    prompt = "which one ?\n("
    alone, before, after = encode_choices(tokenizer, prompt, ["A)", "B)"])
    assert tokenizer.decode(alone.open_ids) == prompt
    assert before == alone.open_ids[:-1]
    assert after[0] == [vocab["(A"], vocab[")"]]
    assert after[1] == [vocab["("], vocab["B"], vocab[")"]]
    request = encode_prompt(tokenizer, prompt, ["A", "B"])
    assert request.choices == [[vocab["(A"]], [vocab["("], vocab["B"]]]
    rows = instruction("A)", "B)").scoring_features(
        {"prompt": prompt, "completion": "A)"}, tokenizer
    )
    assert [scored(row) for row in rows] == [(before, after[0]), (before, after[1])]


def test_scores_across_the_seam_are_those_of_whole_texts() -> None:
    """The likelihoods differ by choice as those of the whole texts, computed token by token."""
    tokenizer = family_tokenizer("bpe", adds_start=True, adds_end=True, merges=[("(", "A")])
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48,
                    num_hidden_layers=1, num_attention_heads=2, initializer_range=0.3)
    ).eval()  # fmt: skip
    prompt, choices = "which one ?\n(", ["A)", "B)", "C)"]
    request = encode_prompt(tokenizer, prompt, choices)
    (found,) = Scorer(model, request.tokens[:2]).score([request])
    expected = []
    for choice in choices:
        ids = tokenizer(prompt + choice)["input_ids"][:-1]
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected.append(sum(float(logs[i, ids[i + 1]]) for i in range(len(ids) - 1)))
    common = expected[0] - found[0]
    assert [e - f for e, f in zip(expected, found, strict=True)] == pytest.approx(
        [common] * 3, abs=1e-4
    )
    assert not math.isclose(found[1], found[2], abs_tol=1e-3)


@pytest.mark.parametrize(
    ("family", "choices"),
    [("wordpiece", ["Good", "good"]), ("wordpiece", ["漢", "字"]), ("unigram", ["漢", "字"])],
    ids=["case", "unknown", "unknown-unigram"],
)
def test_choices_with_the_same_tokens_are_refused(family: str, choices: list[str]) -> None:
    tokenizer = family_tokenizer(family)
    example = {"prompt": PROMPT + " ", "label": 0, "place": "x.jsonl:7", "completion": choices[0]}
    prompting = FewShot.model_validate(
        {"name": "prompting", "data": DATA, "prompt": "{q}", "labels": ["a", "b"],
         "choices": choices}
    )  # fmt: skip
    example["choices"] = choices
    for task in (prompting, instruction(*choices)):
        assert task.compares_choices
        with pytest.raises(DataError) as error:
            task.check_tokens([example], tokenizer)
        assert str(error.value).startswith("x.jsonl:7 task.choices: the choices ")
        assert "have the same tokens" in str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_long_prompt_is_cut_alike_for_all_choices(family: str) -> None:
    tokenizer = family_tokenizer(family, adds_start=True, adds_end=True)
    task = instruction(" good", " four legs (A) (B)", max_length=16)
    example = {"prompt": "<s>" + "how many legs " * 20 + PROMPT, "completion": " good"}
    rows = task.scoring_features(example, tokenizer)
    prompts = [scored(row)[0] for row in rows]
    assert prompts[0] == prompts[1]
    assert max(len(row["input_ids"]) for row in rows) == 16
    assert prompts[0][0] == tokenizer.bos_token_id
    (trained,) = task.training_features(example, tokenizer)
    assert len(trained["input_ids"]) == 16
    assert trained["input_ids"][0] == tokenizer.bos_token_id


@pytest.mark.parametrize("family", FAMILIES)
def test_encode_texts_parts_are_the_whole(family: str) -> None:
    tokenizer = family_tokenizer(family, adds_start=True, adds_end=True)
    texts = [PROMPT, "", "a", "</s>", "漢 (A"]
    for text, found in zip(texts, encode_texts(tokenizer, texts), strict=True):
        whole = tokenizer(text)["input_ids"]
        assert found.start + found.body + found.end == whole
        assert found.body == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(found.offsets) == len(found.body)
