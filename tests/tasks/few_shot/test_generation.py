"""Generated answers are those of a plain generate; drawn ones depend on their seed alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from builders import SHARED, VOCABULARY, prompt_request, tiny_model
from hpcft.tasks.few_shot.generation import generate
from hpcft.tasks.few_shot.requests import PromptRequest
from hpcft.tasks.few_shot.scorer import Scorer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "kind", ["llama", "mistral", "gemma2", "gemma3_text", "opt", "gpt2", "mamba"]
)
def test_greedy_answers_are_those_of_generate(kind: str) -> None:
    model, requests = tiny_model(kind, eos_token_id=None), prompt_request(count=5)
    wanted = [
        model.generate(
            torch.tensor([r.tokens]), max_new_tokens=8, do_sample=False, pad_token_id=0
        )[0, len(r.tokens) :].tolist()
        for r in requests
    ]  # fmt: skip
    assert generate(model, requests[0].tokens[:SHARED], requests, max_new_tokens=8) == wanted


def test_an_answer_ends_before_a_stop_token() -> None:
    model, requests = tiny_model("llama"), prompt_request(count=5)
    prefix = Scorer(model, requests[0].tokens[:SHARED]).prefix
    whole = generate(model, prefix, requests, max_new_tokens=8)
    stop = {whole[0][3], whole[1][0]}
    wanted = [
        answer[: min((answer.index(s) for s in stop if s in answer), default=8)] for answer in whole
    ]
    assert generate(model, prefix, requests, max_new_tokens=8, stop=stop) == wanted
    assert wanted[1] == []


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_drawn_answer_depends_on_its_seed_alone(kind: str) -> None:
    model, requests = tiny_model(kind), prompt_request(count=6)
    prefix = Scorer(model, requests[0].tokens[:SHARED]).prefix
    seeds = [11, 12, 13, 14, 15, 16]

    def drawn(chosen: list[int], seeds: list[int]) -> list[list[int]]:
        return generate(
            model, prefix, [requests[i] for i in chosen], max_new_tokens=8, temperature=2.0,
            seeds=seeds,
        )  # fmt: skip

    every = drawn([0, 1, 2, 3, 4, 5], seeds)
    assert drawn([4, 1], [15, 12]) == [every[4], every[1]]
    assert drawn([3], [14]) == [every[3]]
    assert drawn([3], [15]) != [every[3]]


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    model, request = tiny_model("llama", vocab_size=16), PromptRequest([1, 5, 6], [])
    with torch.no_grad():
        shares = (model(torch.tensor([request.tokens])).logits[0, -1] / 0.7).softmax(0)
    count = 4000
    found = generate(
        model, [1], [request] * count, max_new_tokens=1, temperature=0.7, seeds=range(count)
    )
    drawn = torch.bincount(torch.tensor(found).flatten(), minlength=16) / count
    assert (drawn - shares).abs().max() < 4 * (0.25 / count) ** 0.5


def test_ranks_may_agree_to_go_on() -> None:
    """A rank whose answers are done takes steps for as long as another needs them."""
    model, requests = tiny_model("llama"), prompt_request(count=2)
    steps: list[bool] = []
    outputs: list[Any] = []
    model.lm_head.register_forward_hook(lambda *call: outputs.append(call))

    def agree(done: bool) -> bool:
        steps.append(done)
        return len(steps) == 6

    prefix = requests[0].tokens[:SHARED]
    found = generate(
        model, prefix, requests, max_new_tokens=6, stop=set(range(VOCABULARY)), agree=agree
    )
    assert found == [[], []]
    assert steps == [True] * 6
    assert len(outputs) == 1 + 6


def test_drawing_asks_for_seeds() -> None:
    with pytest.raises(ValueError, match="needs a seed"):
        generate(nn.Identity(), [1], prompt_request(), max_new_tokens=1, temperature=1.0)
