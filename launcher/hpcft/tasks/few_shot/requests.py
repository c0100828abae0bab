"""Encodes prompts and their choices into requests of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PromptRequest:
    """Holds the tokens of one example: a whole prompt, shots included, and its choices."""

    tokens: list[int]
    """Tokens of the prompt, without any choice; at least one."""

    choices: list[list[int]]
    """Tokens of each choice, given this prompt; at least one each. Empty if text is generated."""


def encode_prompt(tokenizer: Any, prompt: str, choices: Sequence[str]) -> PromptRequest:
    """Encodes a prompt and its choices as lm-eval does.

    A tokenizer may join the last space of a prompt with the word after it. So the spaces that end
    the prompt go to the choices, and the tokens of a choice are those that it adds to the prompt
    when both are encoded together (`_encode_pair` of lm-eval 0.4). A start token that the prompt
    spells out is not added a second time.

    Raises:
        ValueError: the prompt is empty, or a choice adds no token to it.
    """
    context = prompt.rstrip()
    spaces = prompt[len(context) :]
    options: dict[str, Any] = {}
    if tokenizer.bos_token and prompt.startswith(tokenizer.bos_token):
        options["add_special_tokens"] = False
    tokens = list(tokenizer.encode(context, **options))
    both = [list(tokenizer.encode(context + spaces + choice, **options)) for choice in choices]
    choice_tokens = [encoded[len(tokens) :] for encoded in both]
    for choice, added in zip(choices, choice_tokens, strict=True):
        if not added:
            raise ValueError(f"the choice {choice!r} adds no token to its prompt")
    if not tokens:
        raise ValueError("the prompt is empty: there is nothing that the choices could follow")
    return PromptRequest(tokens, choice_tokens)


def common_prefix_length(requests: Sequence[PromptRequest]) -> int:
    """Returns how many leading tokens all prompts share, leaving at least one to each of them."""
    first = min((request.tokens for request in requests), default=[])
    last = max((request.tokens for request in requests), default=[])
    shared = next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b),
        min(len(first), len(last)),
    )
    return max(0, min(shared, min((len(r.tokens) for r in requests), default=0) - 1))


def count_row_tokens(request: PromptRequest, prefix_length: int) -> int:
    """Counts the tokens that a request puts into a batch.

    They are the prompt's after the prefix, and those of each choice but its last.
    """
    own = len(request.tokens) - prefix_length
    return own + sum(len(choice) - 1 for choice in request.choices)
