"""Encodes prompts and their choices into requests of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hpcft.tasks.text_encoding import encode_choices, encode_texts


@dataclass(frozen=True)
class PromptRequest:
    """Holds the tokens of one example: a whole prompt, shots included, and its choices."""

    tokens: list[int]
    """Tokens of the prompt, without any choice; at least one."""

    choices: list[list[int]]
    """Tokens of each choice, given this prompt; at least one each. Empty if text is generated."""


def encode_prompt(tokenizer: Any, prompt: str, choices: Sequence[str]) -> PromptRequest:
    """Encodes a prompt and its choices.

    A tokenizer may join the last space of a prompt with the word after it. So the spaces that end
    the prompt go to the choices, as in lm-eval (`_encode_pair` of lm-eval 0.4). The prompt has no
    end token, since the answer follows it, and a start token that it spells out is not added a
    second time.

    Args:
        tokenizer: the model's tokenizer.
        prompt: the whole prompt.
        choices: texts of the choices; none if the answer is generated.

    Raises:
        ValueError: the prompt is empty, a choice adds no token to it, or two have the same tokens.
    """
    context = prompt.rstrip()
    spaces = prompt[len(context) :]
    if choices:
        _, tokens, after = encode_choices(tokenizer, context, [spaces + c for c in choices])
        return PromptRequest(tokens, after)
    (text,) = encode_texts(tokenizer, [context])
    if not text.open_ids:
        raise ValueError("the prompt is empty: there is nothing that the answer could follow")
    return PromptRequest(text.open_ids, [])


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
