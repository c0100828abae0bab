"""Generates answers to a batch of prompts that share their beginning."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from hpcft.tasks.few_shot.prefix_cache import (
    Prefix,
    input_device,
    model_after_prefix,
    run_prefix,
)
from hpcft.tasks.few_shot.requests import PromptRequest
from hpcft.tasks.few_shot.scorer import run_tree
from hpcft.tasks.few_shot.token_layout import tree_layout, tree_tensors

LogitSteps = Generator[Tensor, Tensor, None]
"""Yields the logits of each row's next token, (B, V); is sent the chosen tokens, (B, 1)."""


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
    """Generates an answer to each prompt: its tokens, without the stop token that ended it.

    Args:
        model: a causal model of transformers, in evaluation mode.
        prefix: the tokens that all prompts begin with, or `Scorer.prefix`.
        requests: the prompts of one batch.
        max_new_tokens: largest number of tokens of an answer.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it and a token is
            sampled.
        seeds: one for each request, if tokens are sampled. An answer depends on its own seed alone,
            not on the rest of the batch.
        stop: tokens that end an answer.
        agree: is called after each step with whether all answers are done, and decides. Ranks that
            share a sharded model have to take equally many steps: they ask one another here.

    Raises:
        ValueError: tokens are sampled without seeds.
    """
    if temperature and seeds is None:
        raise ValueError("tokens are sampled: each request needs a seed")
    seeds = seeds or []
    if not isinstance(prefix, Prefix):
        prefix = run_prefix(model, prefix)
    answers: list[list[int]] = [[] for _ in requests]
    for group in _concurrent_requests(requests, prefix):
        batch = [PromptRequest(requests[i].tokens, []) for i in group]
        steps = (_tree_steps if prefix.sharing == "cascade" else _flat_steps)(model, prefix, batch)
        numbers = (
            _random_numbers([seeds[i] for i in group], max_new_tokens)
            if seeds and temperature
            else None
        )
        unfinished = set(group)
        logits = next(steps)
        for step in range(max_new_tokens):
            number = None if numbers is None else numbers[:, step].to(logits.device)
            tokens = _choose_tokens(logits, temperature, number)
            for i, token in zip(group, tokens.flatten().tolist(), strict=True):
                if i in unfinished and token in stop:
                    unfinished.remove(i)
                elif i in unfinished:
                    answers[i].append(token)
            if agree(not unfinished or step == max_new_tokens - 1):
                break
            logits = steps.send(tokens)
    return answers


def _concurrent_requests(requests: Sequence[PromptRequest], prefix: Prefix) -> list[list[int]]:
    """Groups the requests that run together: all; without `cascade`, those of one length."""
    by_length = sorted(range(len(requests)), key=lambda i: len(requests[i].tokens))
    if prefix.sharing == "cascade":
        return [by_length] if by_length else []
    return [list(group) for _, group in groupby(by_length, key=lambda i: len(requests[i].tokens))]


def _random_numbers(seeds: Sequence[int], count: int) -> Tensor:
    """Draws numbers from 0 to 1 for each request's tokens, (B, count), the same on any device."""
    return torch.stack(
        [
            torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
    )


def _choose_tokens(logits: Tensor, temperature: float, numbers: Tensor | None) -> Tensor:
    """Chooses the next token of each row, (B, 1): the likeliest, or by a random number (B,)."""
    if numbers is None:
        return logits.argmax(1, keepdim=True)
    cumulative = (logits.double() / temperature).softmax(1).cumsum(1)
    tokens = torch.searchsorted(cumulative, numbers[:, None] * cumulative[:, -1:], right=True)
    return tokens.clamp_(max=logits.shape[1] - 1)


def _tree_steps(model: Any, prefix: Prefix, requests: Sequence[PromptRequest]) -> LogitSteps:
    """Runs all rows in one sequence that reads one copy of the prefix."""
    layout = tree_layout(requests, len(prefix.tokens))
    tokens, row_masks = tree_tensors(layout, prefix, input_device(model))
    row_masks.row_cache = {}
    rows, width = tokens.shape
    depths = torch.tensor([[column] for _, column in layout.outputs], device=tokens.device)
    starts = torch.arange(rows, device=tokens.device)[:, None] * width
    logits = run_tree(model, tokens, row_masks, (starts + depths).flatten())
    while True:
        tokens = yield logits
        depths = depths + 1
        row_masks = row_masks.next_token_rows(depths)
        logits = run_tree(model, tokens, row_masks, torch.arange(rows, device=tokens.device))


def _flat_steps(model: Any, prefix: Prefix, requests: Sequence[PromptRequest]) -> LogitSteps:
    """Runs rows of one length over copies of the prefix; without a cache, their whole prompts."""
    rows = [request.tokens[len(prefix.tokens) :] for request in requests]
    tokens = torch.tensor(rows, device=input_device(model))
    cache = prefix.expand_cache(len(rows))
    if cache is not None:
        model = model_after_prefix(model)
    while True:
        logits = model(
            input_ids=tokens, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1
        ).logits[:, -1]
        chosen = yield logits
        tokens = torch.cat([tokens, chosen], 1) if cache is None else chosen
