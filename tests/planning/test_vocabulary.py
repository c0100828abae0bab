"""Tests that a tokenizer with more tokens than the model has embeddings is refused at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from builders import llama_folder, recipe
from hpcft.core.errors import DataError
from hpcft.planning import model_facts

TASK = {"name": "instruction", "prompt": "{q}", "completion": "{a}", "data": {"path": "x/y"}}


def check(path: Path, tokenizer: Path | None = None) -> None:
    model = {"path": str(path), **({"tokenizer": str(tokenizer)} if tokenizer else {})}
    made = recipe(model=model, task=TASK, method={"name": "full"})
    model_facts.compute_model_facts(made.model, made.task, made.method)


def with_tokens(folder: Path, **added: Any) -> Path:
    """Adds tokens to the tokenizer in a folder, but no embeddings to the model."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if "words" in added:
        tokenizer.add_tokens(added["words"])
    if "special" in added:
        tokenizer.add_tokens(added["special"], special_tokens=True)
    if "pad" in added:
        tokenizer.add_special_tokens({"pad_token": added["pad"]})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("added", [{"words": ["horse"]}, {"pad": "[PAD]"}])
def test_tokens_without_an_embedding_are_refused(added: dict[str, Any], workplace: Path) -> None:
    """A padding token that was added without resizing the model is the usual cause."""
    folder = llama_folder(workplace / "base")
    check(folder)
    with pytest.raises(DataError, match="has 259 embeddings") as refused:
        check(with_tokens(folder, **added))
    assert "the id 259" in str(refused.value)
    assert "resize_token_embeddings" in str(refused.value)


def test_tokenizer_of_another_folder_is_checked(workplace: Path) -> None:
    base, other = llama_folder(workplace / "base"), llama_folder(workplace / "other")
    check(base, other)
    with pytest.raises(DataError, match=r"^model.tokenizer: .*other"):
        check(base, with_tokens(other, words=["horse"]))


def test_special_tokens_that_no_text_gets_are_no_fault(workplace: Path) -> None:
    """Gemma 3's text models have no embedding for the token that stands for an image."""
    check(with_tokens(llama_folder(workplace / "base"), special=["<image_soft_token>"]))


def test_a_model_that_was_resized_is_accepted(workplace: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = with_tokens(llama_folder(workplace / "base"), words=["horse"])
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(260)
    model.save_pretrained(folder)
    check(folder)
