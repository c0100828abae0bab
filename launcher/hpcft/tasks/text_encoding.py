"""Encodes texts for causal models: special tokens at the ends, and choices after a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class EncodedText:
    """Holds the tokens of a text, apart from those that the tokenizer puts at its ends."""

    start: list[int]
    """Special tokens in front of the text, such as `<s>`."""
    body: list[int]
    """Tokens of the text itself."""
    end: list[int]
    """Special tokens after the text: `</s>` where the tokenizer has `add_eos_token`, or BERT's
    `[SEP]`. Nothing can follow them."""
    offsets: list[tuple[int, int]]
    """Characters that each token of `body` covers."""

    @property
    def open_ids(self) -> list[int]:
        """Tokens without those at the end, so that others can follow."""
        return self.start + self.body


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[EncodedText]:
    """Encodes texts; a start token that a text spells out is not added a second time."""
    encoded = tokenizer(
        list(texts), return_special_tokens_mask=True, return_offsets_mapping=True, verbose=False
    )
    columns = ("input_ids", "special_tokens_mask", "offset_mapping")
    rows = zip(*(encoded[name] for name in columns), strict=True)
    return [_split_special(*map(list, row)) for row in rows]


def _split_special(ids: list[int], is_special: list[int], offsets: list[Any]) -> EncodedText:
    # The mask tells the tokens that were added, not those that the text spells out.
    first = next((i for i, special in enumerate(is_special) if not special), len(ids))
    last = len(ids) - next((i for i, special in enumerate(is_special[::-1]) if not special), 0)
    start, body, places = ids[:first], ids[first:last], offsets[first:last]
    if start and body[:first] == start:
        body, places = body[first:], places[first:]
    return EncodedText(start, body, ids[last:], [(left, right) for left, right in places])


def encode_choices(
    tokenizer: Any, prompt: str, choices: Sequence[str]
) -> tuple[EncodedText, list[int], list[list[int]]]:
    """Encodes the choices that may follow a prompt.

    Prompt and choice are encoded as one text, as the model meets them later. A token may reach
    across the seam, `(A` of the prompt `(` and the choice `A)`: then the tokens of all choices
    begin before it, so that all are scored after the same tokens.

    Args:
        tokenizer: the model's tokenizer.
        prompt: the text before the choices.
        choices: the texts after it; at least one.

    Returns:
        The prompt alone; the tokens that are the same with each choice; and the tokens of each
        choice after them.

    Raises:
        ValueError: a choice adds no token, two have the same tokens, or there is no token before
            them.
    """
    alone, *both = encode_texts(tokenizer, [prompt, *(prompt + choice for choice in choices)])
    shared = min(_common_length(alone.open_ids, text.open_ids) for text in both)
    after = [text.open_ids[shared:] for text in both]
    seen: dict[tuple[int, ...], str] = {}
    for choice, tokens in zip(choices, after, strict=True):
        if not tokens:
            raise ValueError(f"the choice {choice!r} adds no token to its prompt")
        other = seen.setdefault(tuple(tokens), choice)
        if other is not choice:
            raise ValueError(
                f"the choices {other!r} and {choice!r} have the same tokens after the prompt, so "
                "that no model can tell them apart; use other words"
            )
    if not alone.open_ids:
        raise ValueError("the prompt is empty: there is nothing that the choices could follow")
    if not shared:
        raise ValueError("the prompt's first token changes with the choice after it; lengthen it")
    return alone, alone.open_ids[:shared], after


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Returns the number of leading tokens that are the same in both."""
    pairs = zip(first, second, strict=False)
    shorter = min(len(first), len(second))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
