"""What a model answers to a batch of prompts that share their beginning."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from hpcft.tasks.few_shot.prefix_cache import Prefix, device_of, reader, run_prefix
from hpcft.tasks.few_shot.requests import PromptRequest
from hpcft.tasks.few_shot.scorer import run_rows
from hpcft.tasks.few_shot.token_layout import tensors, tree_rows

Steps = Generator[Tensor, Tensor, None]
"""Gives the logits of each row's next token, (B, V); takes the tokens that were chosen, (B, 1)."""


@torch.no_grad()
def generate(
    model: Any,
    prefix: Sequence[int] | Prefix,
    requests: Sequence[PromptRequest],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seeds: Sequence[int] | None = None,
    stop: Collection[int] = (),
    agree: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """The tokens that the model writes after each prompt, without the one that ended them.

    Args:
        model: a causal model of transformers, in evaluation mode.
        prefix: the tokens that all prompts begin with, or what `Scorer.prefix` kept of them.
        requests: the prompts, one batch.
        max_new_tokens: after how many an answer ends in any case.
        temperature: 0 takes the likeliest token; else one is drawn, its logits divided by this.
        seeds: one for each request, where tokens are drawn. An answer depends on its own seed
            alone, not on what else is in the batch.
        stop: tokens that end an answer.
        agree: asked after each step whether all are done. Ranks that share a sharded model have
            to take as many steps: they ask one another here.
    """
    if temperature and seeds is None:
        raise ValueError("tokens are drawn: each request needs a seed")
    seeds = seeds or []
    if not isinstance(prefix, Prefix):
        prefix = run_prefix(model, prefix)
    answers: list[list[int]] = [[] for _ in requests]
    for chosen in _together(requests, prefix):
        batch = [PromptRequest(requests[i].tokens, []) for i in chosen]
        steps = (_tree if prefix.sharing == "cascade" else _plain)(model, prefix, batch)
        draws = (
            _draws([seeds[i] for i in chosen], max_new_tokens) if seeds and temperature else None
        )
        open_rows = set(chosen)
        logits = next(steps)
        for step in range(max_new_tokens):
            draw = None if draws is None else draws[:, step].to(logits.device)
            tokens = _pick(logits, temperature, draw)
            for i, token in zip(chosen, tokens.flatten().tolist(), strict=True):
                if i in open_rows and token in stop:
                    open_rows.remove(i)
                elif i in open_rows:
                    answers[i].append(token)
            if agree(not open_rows or step == max_new_tokens - 1):
                break
            logits = steps.send(tokens)
    return answers


def _together(requests: Sequence[PromptRequest], prefix: Prefix) -> list[list[int]]:
    """Which rows run side by side: all, but with a plain cache only those of one length."""
    every = sorted(range(len(requests)), key=lambda i: len(requests[i].tokens))
    if prefix.sharing == "cascade":
        return [every] if every else []
    return [list(group) for _, group in groupby(every, key=lambda i: len(requests[i].tokens))]


def _draws(seeds: Sequence[int], count: int) -> Tensor:
    """Numbers between 0 and 1 for each request's tokens, (B, count), the same on any device."""
    return torch.stack(
        [
            torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
    )


def _pick(logits: Tensor, temperature: float, draw: Tensor | None) -> Tensor:
    """The next token of each row, (B, 1): the likeliest, or the one that the number drawn hits."""
    if draw is None:
        return logits.argmax(1, keepdim=True)
    heaped = (logits.double() / temperature).softmax(1).cumsum(1)
    found = torch.searchsorted(heaped, draw[:, None] * heaped[:, -1:], right=True)
    return found.clamp_(max=logits.shape[1] - 1)


def _tree(model: Any, prefix: Prefix, requests: Sequence[PromptRequest]) -> Steps:
    """All rows in one sequence that reads one copy of the prefix; each keeps its own tokens."""
    layout = tree_rows(requests, len(prefix.tokens))
    tokens, rows = tensors(layout, prefix, device_of(model))
    rows.kept = {}
    count, width = tokens.shape
    lasts = torch.tensor([[column] for _, column in layout.outputs], device=tokens.device)
    starts = torch.arange(count, device=tokens.device)[:, None] * width
    logits = run_rows(model, tokens, rows, (starts + lasts).flatten())
    while True:
        tokens = yield logits
        lasts = lasts + 1
        rows = rows.followed(lasts)
        logits = run_rows(model, tokens, rows, torch.arange(count, device=tokens.device))


def _plain(model: Any, prefix: Prefix, requests: Sequence[PromptRequest]) -> Steps:
    """Rows of one length over copies of the prefix; their whole prompts, where nothing is kept."""
    rows = [request.tokens[len(prefix.tokens) :] for request in requests]
    tokens = torch.tensor(rows, device=device_of(model))
    cache = prefix.copies(len(rows))
    if cache is not None:
        model = reader(model)
    while True:
        logits = model(
            input_ids=tokens, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1
        ).logits[:, -1]
        new = yield logits
        tokens = torch.cat([tokens, new], 1) if cache is None else new
