"""Compares generated answers with those of transformers, and checks sampling by seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from builders import SHARED, VOCABULARY, prompt_requests, tiny_model
from hpcft.tasks.few_shot.generation import generate
from hpcft.tasks.few_shot.requests import PromptRequest
from hpcft.tasks.few_shot.scorer import Scorer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "kind", ["llama", "mistral", "gemma2", "gemma3_text", "opt", "gpt2", "mamba"]
)
def test_generate_greedy_equals_transformers(kind: str) -> None:
    model, requests = tiny_model(kind, eos_token_id=None), prompt_requests(count=5)
    expected = [
        model.generate(
            torch.tensor([r.tokens]), max_new_tokens=8, do_sample=False, pad_token_id=0
        )[0, len(r.tokens) :].tolist()
        for r in requests
    ]  # fmt: skip
    assert generate(model, requests[0].tokens[:SHARED], requests, max_new_tokens=8) == expected


def test_generate_ends_answer_before_stop_token() -> None:
    model, requests = tiny_model("llama"), prompt_requests(count=5)
    prefix = Scorer(model, requests[0].tokens[:SHARED]).prefix
    whole = generate(model, prefix, requests, max_new_tokens=8)
    stop = {whole[0][3], whole[1][0]}
    expected = [
        answer[: min((answer.index(s) for s in stop if s in answer), default=8)] for answer in whole
    ]
    assert generate(model, prefix, requests, max_new_tokens=8, stop=stop) == expected
    assert expected[1] == []


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generate_sampled_answer_depends_on_its_seed_alone(kind: str) -> None:
    model, requests = tiny_model(kind), prompt_requests(count=6)
    prefix = Scorer(model, requests[0].tokens[:SHARED]).prefix
    seeds = [11, 12, 13, 14, 15, 16]

    def drawn(chosen: list[int], seeds: list[int]) -> list[list[int]]:
        return generate(
            model, prefix, [requests[i] for i in chosen], max_new_tokens=8, temperature=2.0,
            seeds=seeds,
        )  # fmt: skip

    answers = drawn([0, 1, 2, 3, 4, 5], seeds)
    assert drawn([4, 1], [15, 12]) == [answers[4], answers[1]]
    assert drawn([3], [14]) == [answers[3]]
    assert drawn([3], [15]) != [answers[3]]


def test_generate_samples_tokens_by_their_probability() -> None:
    model, request = tiny_model("llama", vocab_size=16), PromptRequest([1, 5, 6], [])
    with torch.no_grad():
        shares = (model(torch.tensor([request.tokens])).logits[0, -1] / 0.7).softmax(0)
    count = 4000
    answers = generate(
        model, [1], [request] * count, max_new_tokens=1, temperature=0.7, seeds=range(count)
    )
    drawn = torch.bincount(torch.tensor(answers).flatten(), minlength=16) / count
    assert (drawn - shares).abs().max() < 4 * (0.25 / count) ** 0.5


def test_generate_continues_until_ranks_agree() -> None:
    """A rank whose answers are complete takes more steps while another rank needs them."""
    model, requests = tiny_model("llama"), prompt_requests(count=2)
    steps: list[bool] = []
    outputs: list[Any] = []
    model.lm_head.register_forward_hook(lambda *call: outputs.append(call))

    def agree(done: bool) -> bool:
        steps.append(done)
        return len(steps) == 6

    prefix = requests[0].tokens[:SHARED]
    answers = generate(
        model, prefix, requests, max_new_tokens=6, stop=set(range(VOCABULARY)), agree=agree
    )
    assert answers == [[], []]
    assert steps == [True] * 6
    assert len(outputs) == 1 + 6


def test_generate_sampling_without_seeds_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a seed"):
        generate(nn.Identity(), [1], prompt_requests(), max_new_tokens=1, temperature=1.0)
