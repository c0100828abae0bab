"""Lays out a batch's tokens in rows, and says which outputs score which choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hpcft.tasks.few_shot.cascade_attention import PADDING, PROMPT, RowMasks
from hpcft.tasks.few_shot.prefix_cache import Prefix
from hpcft.tasks.few_shot.requests import PromptRequest


@dataclass
class TokenLayout:
    """Holds a batch's tokens, row by row, before they become tensors."""

    rows: list[list[int]] = field(default_factory=list)
    """Tokens of each row, without padding."""

    depths: list[list[int]] = field(default_factory=list)
    """Place of each token after the prefix."""

    branches: list[list[int]] = field(default_factory=list)
    """Branch of each token: that of the prompt, or of a choice."""

    outputs: list[tuple[int, int]] = field(default_factory=list)
    """Row and column of every token whose next token is scored, row after row."""

    scored: list[tuple[int, int, int]] = field(default_factory=list)
    """For each token of each choice: index in `outputs`, token, number of the choice."""


def tree_layout(requests: Sequence[PromptRequest], prefix_length: int) -> TokenLayout:
    """Lays out a row for each request: its tokens, then those of each choice but its last."""
    layout = TokenLayout()
    number = 0
    for index, request in enumerate(requests):
        row = request.tokens[prefix_length:]
        own = len(row)
        depths, branches = list(range(own)), [PROMPT] * own
        first = len(layout.outputs)
        layout.outputs.append((index, own - 1))
        for branch, choice in enumerate(request.choices, start=1):
            more = len(choice) - 1
            outputs = [first, *range(len(layout.outputs), len(layout.outputs) + more)]
            layout.outputs += [(index, len(row) + i) for i in range(more)]
            layout.scored += [
                (output, token, number) for output, token in zip(outputs, choice, strict=True)
            ]
            row = row + choice[:-1]
            depths += range(own, own + more)
            branches += [branch] * more
            number += 1
        layout.rows.append(row)
        layout.depths.append(depths)
        layout.branches.append(branches)
    return layout


def flat_layout(requests: Sequence[PromptRequest], prefix_length: int) -> TokenLayout:
    """Lays out a row for each choice: the prompt's tokens, then the choice's but its last.

    Choices of a request whose rows are equal share one.
    """
    layout = TokenLayout()
    number = 0
    for request in requests:
        own = request.tokens[prefix_length:]
        first_outputs: dict[tuple[int, ...], int] = {}  # by row of this request
        for choice in request.choices:
            row = own + choice[:-1]
            if tuple(row) not in first_outputs:
                first_outputs[tuple(row)] = len(layout.outputs)
                columns = range(len(own) - 1, len(row))
                layout.outputs += [(len(layout.rows), column) for column in columns]
                layout.rows.append(row)
            first = first_outputs[tuple(row)]
            layout.scored += [(first + i, token, number) for i, token in enumerate(choice)]
            number += 1
    return layout


def tree_tensors(
    layout: TokenLayout, prefix: Prefix, device: torch.device
) -> tuple[Tensor, RowMasks]:
    """Returns the tokens of a tree layout, (B, S), and the masks of their attention."""
    row_masks = RowMasks(
        prefix,
        pad_rows(layout.depths, 0, device),
        pad_rows(layout.branches, PADDING, device),
        max_depth=max(map(max, layout.depths)),
        is_causal=all(branch == PROMPT for row in layout.branches for branch in row),
    )
    return pad_rows(layout.rows, 0, device), row_masks


def pad_rows(rows: list[list[int]], fill: int, device: torch.device) -> Tensor:
    """Returns rows of different lengths as one tensor, filled at their ends."""
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], device=device)
