"""How likely a model finds each choice of a prompt, one forward for a batch of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hpcft.tasks.few_shot.cascade_attention import RowMasks, attending
from hpcft.tasks.few_shot.prefix_cache import Prefix, device_of, reader, run_prefix
from hpcft.tasks.few_shot.requests import PromptRequest
from hpcft.tasks.few_shot.token_layout import TokenLayout, padded, plain_rows, tensors, tree_rows

PIECE = 2**24
"""Most logits that are brought to fp32 at a time: 64 MiB."""


class Scorer:
    """A model with its shared prefix, ready to score batch after batch of requests."""

    def __init__(self, model: Any, prefix: Sequence[int]) -> None:
        """Run the prefix through the model, which is put into evaluation mode.

        Args:
            model: a causal model of transformers, with adapters or without.
            prefix: the tokens that all prompts begin with (`common_prefix`).
        """
        self.model = model.eval()
        self.prefix: Prefix = run_prefix(model, prefix)

    @property
    def shared_tokens(self) -> int:
        """The tokens of each prompt that no batch holds once more: for `batches`."""
        return len(self.prefix.tokens) if self.prefix.sharing == "cascade" else 0

    def score(self, requests: Sequence[PromptRequest]) -> list[list[float]]:
        """The log-likelihood of each choice of each request: the sum over its tokens.

        One forward; where nothing can be shared (`Prefix.sharing`), one for each row.
        """
        values = iter(self.log_likelihoods(requests).tolist())
        return [[next(values) for _ in request.choices] for request in requests]

    @torch.no_grad()
    def log_likelihoods(self, requests: Sequence[PromptRequest]) -> Tensor:
        """The same as one tensor, choice after choice, without waiting for the device."""
        length = len(self.prefix.tokens)
        if self.prefix.sharing == "cascade":
            layout = tree_rows(requests, length)
            logits = self._tree(layout)
        else:
            layout = plain_rows(requests, length)
            every = range(len(layout.rows))
            together = [every] if self.prefix.sharing == "expanded" else [[row] for row in every]
            logits = torch.cat([self._plain(layout, rows) for rows in together])
        choices = sum(len(request.choices) for request in requests)
        return _sums(logits, layout.asked, choices)

    def _tree(self, layout: TokenLayout) -> Tensor:
        """Logits of the outputs: all rows in one sequence that reads one copy of the prefix."""
        tokens, rows = tensors(layout, self.prefix, device_of(self.model))
        width = tokens.shape[1]
        kept = [row * width + column for row, column in layout.outputs]
        return run_rows(self.model, tokens, rows, torch.tensor(kept, device=tokens.device))

    def _plain(self, layout: TokenLayout, chosen: Sequence[int]) -> Tensor:
        """Logits of the outputs of some rows, each with a copy of the prefix, padded at its end."""
        device = device_of(self.model)
        ids = padded([layout.rows[row] for row in chosen], 0, device)
        places = [
            (row - chosen[0], c) for row, c in layout.outputs if chosen[0] <= row <= chosen[-1]
        ]
        first = min(column for _, column in places)
        cache = self.prefix.copies(len(chosen))
        model = self.model if cache is None else reader(self.model)
        logits = model(
            input_ids=ids, past_key_values=cache, use_cache=cache is not None,
            logits_to_keep=ids.shape[1] - first,
        ).logits  # fmt: skip
        rows, columns = torch.tensor(places, device=device).T
        return logits[rows, columns - first]  # type: ignore[no-any-return]


def run_rows(model: Any, tokens: Tensor, rows: RowMasks, kept: Tensor) -> Tensor:
    """One forward of all rows, (B, S), as one sequence: logits of the kept places, (n, V)."""
    model = reader(model)
    with attending(model):
        return model(  # type: ignore[no-any-return]
            input_ids=tokens.view(1, -1), position_ids=rows.depths.view(1, -1) + rows.prefix.length,
            use_cache=False, logits_to_keep=kept, rows=rows,
        ).logits[0]  # fmt: skip


def _sums(logits: Tensor, asked: list[tuple[int, int, int]], choices: int) -> Tensor:
    """The log-likelihood of each choice, in fp32."""
    step = max(1, PIECE // logits.shape[1])
    totals = torch.cat([piece.float().logsumexp(1) for piece in torch.split(logits, step)])
    outputs, tokens, numbers = torch.tensor(asked, device=logits.device).T
    found = logits[outputs, tokens].float() - totals[outputs]
    return found.new_zeros(choices).index_add_(0, numbers, found)
