"""Where a batch's tokens lie in its rows, and which outputs say what of which choice."""

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
    """A batch before it is tensors."""

    rows: list[list[int]] = field(default_factory=list)
    """The tokens of each row, without padding."""

    depths: list[list[int]] = field(default_factory=list)
    """The place of each token after the prefix."""

    branches: list[list[int]] = field(default_factory=list)
    """Whether a token is the prompt's, or which choice's."""

    outputs: list[tuple[int, int]] = field(default_factory=list)
    """Row and column of every token whose next token is asked for, row after row."""

    asked: list[tuple[int, int, int]] = field(default_factory=list)
    """Each token of each choice: the output it is read from, the token, the choice's number."""


def tree_rows(requests: Sequence[PromptRequest], prefix: int) -> TokenLayout:
    """One row a request: its tokens, then those of each choice but its last, side by side."""
    layout = TokenLayout()
    number = 0
    for index, request in enumerate(requests):
        row = request.tokens[prefix:]
        own = len(row)
        depths, branches = list(range(own)), [PROMPT] * own
        first = len(layout.outputs)
        layout.outputs.append((index, own - 1))
        for branch, choice in enumerate(request.choices, start=1):
            more = len(choice) - 1
            outputs = [first, *range(len(layout.outputs), len(layout.outputs) + more)]
            layout.outputs += [(index, len(row) + i) for i in range(more)]
            layout.asked += [
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


def plain_rows(requests: Sequence[PromptRequest], prefix: int) -> TokenLayout:
    """One row a choice: the prompt's tokens, then the choice's but its last; equal rows are one."""
    layout = TokenLayout()
    number = 0
    for request in requests:
        own = request.tokens[prefix:]
        firsts: dict[tuple[int, ...], int] = {}  # of each row of this request, its first output
        for choice in request.choices:
            row = own + choice[:-1]
            if tuple(row) not in firsts:
                firsts[tuple(row)] = len(layout.outputs)
                columns = range(len(own) - 1, len(row))
                layout.outputs += [(len(layout.rows), column) for column in columns]
                layout.rows.append(row)
            first = firsts[tuple(row)]
            layout.asked += [(first + i, token, number) for i, token in enumerate(choice)]
            number += 1
    return layout


def tensors(layout: TokenLayout, prefix: Prefix, device: torch.device) -> tuple[Tensor, RowMasks]:
    """The tokens of a tree layout, (B, S), and what attention has to know of them."""
    depths = padded(layout.depths, 0, device)
    rows = RowMasks(
        prefix,
        depths,
        padded(layout.branches, PADDING, device),
        deepest=max(map(max, layout.depths)),
        causal=all(branch == PROMPT for row in layout.branches for branch in row),
    )
    return padded(layout.rows, 0, device), rows


def padded(rows: list[list[int]], fill: int, device: torch.device) -> Tensor:
    """Rows of unlike length as one tensor, filled at their ends."""
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], device=device)
