"""Compares few-shot scores with a plain forward pass over each whole prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from builders import MORE, SHARED, prompt_requests, tiny_model
from hpcft.tasks.few_shot.batching import make_batches
from hpcft.tasks.few_shot.prefix_cache import CASCADE_MODEL_TYPES
from hpcft.tasks.few_shot.requests import (
    PromptRequest,
    common_prefix_length,
    count_row_tokens,
    encode_prompt,
)
from hpcft.tasks.few_shot.scorer import Scorer

SHARING = dict.fromkeys(CASCADE_MODEL_TYPES, "cascade") | {
    "gpt2": "expanded", "gpt_oss": "expanded", "mamba": "none"}  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def plain_scores(model: Any, requests: list[PromptRequest]) -> list[list[float]]:
    """Scores each choice by a forward pass over its whole prompt."""

    def score(tokens: list[int], choice: list[int]) -> float:
        ids = torch.tensor([tokens + choice], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, -1 - len(choice) : -1]
        scores = logits.float().log_softmax(1)
        return sum(scores[i, token].item() for i, token in enumerate(choice))

    return [[score(request.tokens, choice) for choice in request.choices] for request in requests]


def batched_scores(
    model: Any, requests: list[PromptRequest], max_tokens: int = 100
) -> list[list[float]]:
    """Scores all requests, batch by batch."""
    scorer = Scorer(model, requests[0].tokens[: common_prefix_length(requests)])
    scores: dict[int, list[float]] = {}
    for batch in make_batches(requests, scorer.shared_tokens, max_tokens):
        scores |= zip(batch, scorer.score([requests[i] for i in batch]), strict=True)
    return [scores[i] for i in range(len(requests))]


def max_difference(one: list[list[float]], other: list[list[float]]) -> float:
    return max(
        abs(a - b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)
    )


# ---------------------------------------------------------------- scores


@pytest.mark.process
@pytest.mark.parametrize("kind", MORE)
def test_score_every_model_type_equals_plain_forward(kind: str) -> None:
    model, requests = tiny_model(kind), prompt_requests()
    before = model.config._attn_implementation
    assert max_difference(batched_scores(model, requests), plain_scores(model, requests)) < 1e-4
    assert model.config._attn_implementation == before
    assert Scorer(model, requests[0].tokens[:SHARED]).prefix.sharing == SHARING[kind]


def test_cascade_model_types_are_all_tested() -> None:
    assert set(MORE) >= CASCADE_MODEL_TYPES


@pytest.mark.process
@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gemma3_text"])
def test_score_sliding_window_differs_from_wide_window(kind: str) -> None:
    """The same weights without the window give other scores, so that the window is tested."""
    model, requests = tiny_model(kind), prompt_requests()
    wide = tiny_model(kind, sliding_window=500)
    wide.load_state_dict(model.state_dict())
    assert max_difference(batched_scores(model, requests), batched_scores(wide, requests)) > 0.1
    assert max_difference(batched_scores(wide, requests), plain_scores(wide, requests)) < 1e-4


def test_score_one_token_choices_computes_one_output_per_prompt() -> None:
    model, requests = tiny_model("llama"), prompt_requests(choices=(1, 1))
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _, inputs, out: seen.append(out[0].shape[0]))
    scores = batched_scores(model, requests, max_tokens=10_000)
    assert seen == [1, len(requests)]  # the prefix's pass, then one row of logits a prompt
    assert max_difference(scores, plain_scores(model, requests)) < 1e-4


def test_score_runs_prefix_once_and_computes_only_needed_logits() -> None:
    model, requests = tiny_model("llama"), prompt_requests(choices=(2, 4))
    read: list[int] = []
    rows: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, out: read.append(out.shape[1]))
    model.lm_head.register_forward_hook(lambda _, inputs, out: rows.append(out.shape[1]))
    batched_scores(model, requests, max_tokens=10_000)
    longest = max(count_row_tokens(request, SHARED) for request in requests)
    assert read == [SHARED, len(requests) * longest]
    assert rows == [1, len(requests) * (1 + 1 + 3)]  # both choices' first tokens share one


def test_score_without_shared_prefix_equals_plain_forward() -> None:
    model = tiny_model("llama")
    requests = [PromptRequest(r.tokens[SHARED:], r.choices) for r in prompt_requests()]
    assert common_prefix_length(requests) == 0
    assert max_difference(batched_scores(model, requests), plain_scores(model, requests)) < 1e-4


@pytest.mark.process
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_score_in_bf16_is_as_close_to_fp32_as_plain_forward(kind: str) -> None:
    model, requests = tiny_model(kind, initializer_range=0.05), prompt_requests()
    exact = plain_scores(model, requests)
    model = model.to(torch.bfloat16)
    error = max_difference(batched_scores(model, requests), exact)
    assert error < max(0.02, 2 * max_difference(plain_scores(model, requests), exact))


def test_score_lora_adapter_equals_plain_forward() -> None:
    import peft

    base, requests = tiny_model("llama"), prompt_requests()
    without_adapter = plain_scores(base, requests)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    scores = batched_scores(model, requests)
    assert max_difference(scores, without_adapter) > 0.1
    assert max_difference(scores, plain_scores(model, requests)) < 1e-4


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_score_p_tuning_puts_virtual_tokens_before_prefix(kind: str) -> None:
    import peft

    base, requests = tiny_model(kind), prompt_requests()
    without_adapter = plain_scores(base, requests)
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16
    )
    model = peft.get_peft_model(base, config).eval()
    scores = batched_scores(model, requests)
    assert max_difference(scores, without_adapter) > 0.1
    assert max_difference(scores, plain_scores(model, requests)) < 1e-4


def test_score_4bit_model_equals_plain_forward(tmp_path: Path) -> None:
    tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
        device_map="cpu",
    ).eval()
    assert "4bit" in type(model.model.layers[0].mlp.up_proj).__name__
    requests = prompt_requests()
    # bitsandbytes' CPU kernel rounds to bf16 inside: SDPA and eager attention differ as much.
    assert max_difference(batched_scores(model, requests), plain_scores(model, requests)) < 0.02


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_log_likelihoods_on_meta_device_gives_shapes(kind: str) -> None:
    """The planner traces the scorer without values."""
    with torch.device("meta"):
        model = tiny_model(kind)
    requests = prompt_requests()
    scorer = Scorer(model, requests[0].tokens[:SHARED])
    assert scorer.log_likelihoods(requests).shape == (sum(len(r.choices) for r in requests),)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_score_on_gpu_equals_plain_forward(kind: str, dtype: torch.dtype) -> None:
    model, requests = tiny_model(kind, initializer_range=0.05).to("cuda", dtype), prompt_requests()
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    difference = max_difference(batched_scores(model, requests), plain_scores(model, requests))
    assert difference < tolerance


# ---------------------------------------------------------------- lm-eval


SHOTS = "Review: a fine film\nLabel: good\n\nReview: what a bore\nLabel: bad\n\n"
QUERIES = ("moving", "not for me", "two hours that I want back", "well played")
PROMPTS = [f"{SHOTS}Review: {query}\nLabel:" for query in QUERIES]
LABELS = (" good", " bad", " neither of them")


@pytest.mark.process
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind", ["llama", "gemma", "mistral", "gemma2", "gemma3_text", "qwen2", "gpt_neox", "opt"]
)
def test_score_equals_lm_eval(kind: str, tokenizer: Any) -> None:
    from lm_eval.models import huggingface as backends

    model = tiny_model(kind)
    backend = backends.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=512)
    requests = [encode_prompt(tokenizer, prompt, LABELS) for prompt in PROMPTS]
    pairs = [
        (("", ""), *backend._encode_pair(prompt, choice)) for prompt in PROMPTS for choice in LABELS
    ]
    assert [(r.tokens, c) for r in requests for c in r.choices] == [pair[1:] for pair in pairs]
    values = iter(backend._loglikelihood_tokens(pairs, disable_tqdm=True))
    expected = [[next(values)[0] for _ in request.choices] for request in requests]
    scores = batched_scores(model, requests)
    assert max_difference(scores, expected) < 1e-4
    assert [row.index(max(row)) for row in scores] == [row.index(max(row)) for row in expected]
