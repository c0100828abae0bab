"""Checks how prompts and choices are encoded, and the prefix that prompts share."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from hpcft.tasks.few_shot.requests import PromptRequest, common_prefix_length, encode_prompt


def test_encode_prompt_moves_trailing_spaces_to_choices(tokenizer: Any) -> None:
    request = encode_prompt(tokenizer, "Label: ", ["good", "bad"])
    assert tokenizer.decode(request.tokens) == "Label:"
    assert [tokenizer.decode(choice) for choice in request.choices] == [" good", " bad"]


def test_encode_prompt_adds_start_token_once(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    starting = transformers.AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    starting._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", starting.bos_token_id)]
    )
    implicit, spelled = encode_prompt(starting, "a", ["b"]), encode_prompt(starting, "<s>a", ["b"])
    assert implicit == spelled
    assert implicit.tokens.count(starting.bos_token_id) == 1


def test_encode_prompt_refuses_empty_choice_and_empty_prompt(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="adds no token"):
        encode_prompt(tokenizer, "Label:", ["good", ""])
    with pytest.raises(ValueError, match="the prompt is empty"):
        encode_prompt(tokenizer, "", ["good"])


def test_common_prefix_length_leaves_each_prompt_a_token() -> None:
    assert (
        common_prefix_length([PromptRequest([1, 2, 3], []), PromptRequest([1, 2, 4, 5], [])]) == 2
    )
    assert common_prefix_length([PromptRequest([1, 2], []), PromptRequest([1, 2, 4], [])]) == 1
    assert common_prefix_length([PromptRequest([1, 2, 3], [])]) == 2
    assert common_prefix_length([PromptRequest([7], []), PromptRequest([8], [])]) == 0
    assert common_prefix_length([]) == 0
