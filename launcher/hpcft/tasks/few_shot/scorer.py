"""Computes the likelihood of each choice of a prompt, one forward pass per batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hpcft.tasks.few_shot.cascade_attention import RowMasks, use_cascade_attention
from hpcft.tasks.few_shot.prefix_cache import (
    Prefix,
    input_device,
    model_after_prefix,
    run_prefix,
)
from hpcft.tasks.few_shot.requests import PromptRequest
from hpcft.tasks.few_shot.token_layout import (
    TokenLayout,
    flat_layout,
    pad_rows,
    tree_layout,
    tree_tensors,
)

FP32_LOGITS = 2**24
"""Largest number of logits that are cast to fp32 at a time: 64 MiB."""


class Scorer:
    """Scores batch after batch of requests with a model and the prefix that they share."""

    def __init__(self, model: Any, prefix: Sequence[int]) -> None:
        """Puts the model into evaluation mode and runs the prefix through it.

        Args:
            model: a causal model of transformers, with adapters or without.
            prefix: the tokens that all prompts begin with (`common_prefix_length`).
        """
        self.model = model.eval()
        self.prefix: Prefix = run_prefix(model, prefix)

    @property
    def shared_tokens(self) -> int:
        """Number of leading tokens of each prompt that no batch runs again, for `make_batches`."""
        return len(self.prefix.tokens) if self.prefix.sharing == "cascade" else 0

    def score(self, requests: Sequence[PromptRequest]) -> list[list[float]]:
        """Returns the log-likelihood of each choice of each request, summed over its tokens.

        It takes one forward pass; where nothing can be shared (`Prefix.sharing`), one for each row.
        """
        values = iter(self.log_likelihoods(requests).tolist())
        return [[next(values) for _ in request.choices] for request in requests]

    @torch.no_grad()
    def log_likelihoods(self, requests: Sequence[PromptRequest]) -> Tensor:
        """Returns the log-likelihoods as one tensor, choice after choice, without a device sync."""
        length = len(self.prefix.tokens)
        if self.prefix.sharing == "cascade":
            layout = tree_layout(requests, length)
            logits = self._tree_logits(layout)
        else:
            layout = flat_layout(requests, length)
            rows = range(len(layout.rows))
            passes = [rows] if self.prefix.sharing == "expanded" else [[row] for row in rows]
            logits = torch.cat([self._flat_logits(layout, rows) for rows in passes])
        choices = sum(len(request.choices) for request in requests)
        return _sum_by_choice(logits, layout.scored, choices)

    def _tree_logits(self, layout: TokenLayout) -> Tensor:
        """Runs all rows in one sequence that reads one copy of the prefix."""
        tokens, row_masks = tree_tensors(layout, self.prefix, input_device(self.model))
        width = tokens.shape[1]
        places = [row * width + column for row, column in layout.outputs]
        return run_tree(self.model, tokens, row_masks, torch.tensor(places, device=tokens.device))

    def _flat_logits(self, layout: TokenLayout, rows: Sequence[int]) -> Tensor:
        """Runs some rows, each with its own copy of the prefix, padded at the end."""
        device = input_device(self.model)
        ids = pad_rows([layout.rows[row] for row in rows], 0, device)
        places = [
            (row - rows[0], column) for row, column in layout.outputs if rows[0] <= row <= rows[-1]
        ]
        first = min(column for _, column in places)
        cache = self.prefix.expand_cache(len(rows))
        model = self.model if cache is None else model_after_prefix(self.model)
        logits = model(
            input_ids=ids,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=ids.shape[1] - first,
        ).logits
        row_index, column_index = torch.tensor(places, device=device).T
        return logits[row_index, column_index - first]  # type: ignore[no-any-return]


def run_tree(model: Any, tokens: Tensor, row_masks: RowMasks, places: Tensor) -> Tensor:
    """Runs all rows, (B, S), as one sequence; returns the logits of n places of it, (n, V)."""
    model = model_after_prefix(model)
    with use_cascade_attention(model):
        return model(  # type: ignore[no-any-return]
            input_ids=tokens.view(1, -1),
            position_ids=row_masks.depths.view(1, -1) + row_masks.prefix.length,
            use_cache=False,
            logits_to_keep=places,
            row_masks=row_masks,
        ).logits[0]


def _sum_by_choice(logits: Tensor, scored: list[tuple[int, int, int]], choices: int) -> Tensor:
    """Sums the log-likelihoods of each choice's tokens, in fp32.

    Args:
        logits: (n, V).
        scored: `TokenLayout.scored`.
        choices: number of choices.
    """
    step = max(1, FP32_LOGITS // logits.shape[1])
    log_sums = torch.cat([part.float().logsumexp(1) for part in torch.split(logits, step)])
    outputs, tokens, numbers = torch.tensor(scored, device=logits.device).T
    scores = logits[outputs, tokens].float() - log_sums[outputs]
    return scores.new_zeros(choices).index_add_(0, numbers, scores)
