"""What is asked of a model: a prompt in tokens, and choices whose likelihood is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PromptRequest:
    """One example: a whole prompt, shots and all, and the choices that may follow it."""

    tokens: list[int]
    """The prompt, without any choice; at least one token."""

    choices: list[list[int]]
    """Tokens of each choice, given this prompt; at least one each. None to generate."""


def encode(tokenizer: Any, prompt: str, choices: Sequence[str]) -> PromptRequest:
    """The tokens of a prompt and its choices, cut as lm-eval cuts them.

    A tokenizer may join the last space of a prompt with the word after it. So the spaces that end
    the prompt go to the choices, and each choice is what it adds to the prompt when the two are
    encoded together (`_encode_pair` of lm-eval 0.4). A start token that the prompt spells out is
    not added a second time.
    """
    context = prompt.rstrip()
    spaces = prompt[len(context) :]
    options: dict[str, Any] = {}
    if tokenizer.bos_token and prompt.startswith(tokenizer.bos_token):
        options["add_special_tokens"] = False
    tokens = list(tokenizer.encode(context, **options))
    whole = [list(tokenizer.encode(context + spaces + choice, **options)) for choice in choices]
    found = [encoded[len(tokens) :] for encoded in whole]
    for choice, its_tokens in zip(choices, found, strict=True):
        if not its_tokens:
            raise ValueError(f"the choice {choice!r} adds no token to its prompt")
    if not tokens:
        raise ValueError("the prompt is empty: there is nothing that the choices could follow")
    return PromptRequest(tokens, found)


def common_prefix(requests: Sequence[PromptRequest]) -> int:
    """How many leading tokens all prompts share, leaving at least one to each of them."""
    first = min((request.tokens for request in requests), default=[])
    last = max((request.tokens for request in requests), default=[])
    shared = next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b),
        min(len(first), len(last)),
    )
    return max(0, min(shared, min((len(r.tokens) for r in requests), default=0) - 1))


def row_tokens(request: PromptRequest, prefix: int) -> int:
    """How many tokens a request puts into a batch: those of its own, each choice but its last."""
    own = len(request.tokens) - prefix
    return own + sum(len(choice) - 1 for choice in request.choices)
