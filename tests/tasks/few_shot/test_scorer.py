"""Few-shot scoring gives what a plain forward over each whole prompt gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from builders import MORE, SHARED, prompt_request, tiny_model
from hpcft.tasks.few_shot.attention_kernels import additive_mask, attend, eager
from hpcft.tasks.few_shot.batching import make_batches, split_batches
from hpcft.tasks.few_shot.prefix_cache import CASCADE
from hpcft.tasks.few_shot.requests import PromptRequest, common_prefix, encode, row_tokens
from hpcft.tasks.few_shot.scorer import Scorer

WAYS = dict.fromkeys(CASCADE, "cascade") | {"gpt2": "expanded", "gpt_oss": "expanded"} | {
    "mamba": "none"}  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def plain(model: Any, requests: list[PromptRequest]) -> list[list[float]]:
    """Each choice by a forward over its whole prompt."""

    def one(tokens: list[int], choice: list[int]) -> float:
        ids = torch.tensor([tokens + choice], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, -1 - len(choice) : -1]
        scores = logits.float().log_softmax(1)
        return sum(scores[i, token].item() for i, token in enumerate(choice))

    return [[one(request.tokens, choice) for choice in request.choices] for request in requests]


def scored(model: Any, requests: list[PromptRequest], max_tokens: int = 100) -> list[list[float]]:
    """All requests, batch by batch."""
    scorer = Scorer(model, requests[0].tokens[: common_prefix(requests)])
    found: dict[int, list[float]] = {}
    for batch in make_batches(requests, scorer.shared_tokens, max_tokens):
        found |= zip(batch, scorer.score([requests[i] for i in batch]), strict=True)
    return [found[i] for i in range(len(requests))]


def furthest(one: list[list[float]], other: list[list[float]]) -> float:
    return max(
        abs(a - b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)
    )


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("kind", MORE)
def test_scores_are_those_of_a_plain_forward(kind: str) -> None:
    model, requests = tiny_model(kind), prompt_request()
    before = model.config._attn_implementation
    assert furthest(scored(model, requests), plain(model, requests)) < 1e-4
    assert model.config._attn_implementation == before
    assert Scorer(model, requests[0].tokens[:SHARED]).prefix.sharing == WAYS[kind]


def test_each_type_that_shares_one_copy_is_tested() -> None:
    assert set(MORE) >= CASCADE


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gemma3_text"])
def test_the_window_of_these_tests_bites(kind: str) -> None:
    """What a model without the window would say is far from what this one says."""
    model, requests = tiny_model(kind), prompt_request()
    wide = tiny_model(kind, sliding_window=500)
    wide.load_state_dict(model.state_dict())
    assert furthest(scored(model, requests), scored(wide, requests)) > 0.1
    assert furthest(scored(wide, requests), plain(wide, requests)) < 1e-4


def test_one_token_labels_need_no_mask_and_one_output_each() -> None:
    model, requests = tiny_model("llama"), prompt_request(choices=(1, 1))
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _, inputs, out: seen.append(out[0].shape[0]))
    found = scored(model, requests, max_tokens=10_000)
    assert seen == [1, len(requests)]  # the prefix's pass, then one row of logits a prompt
    assert furthest(found, plain(model, requests)) < 1e-4


def test_the_prefix_is_run_once_and_only_label_positions_reach_the_vocabulary() -> None:
    model, requests = tiny_model("llama"), prompt_request(choices=(2, 4))
    read: list[int] = []
    rows: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, out: read.append(out.shape[1]))
    model.lm_head.register_forward_hook(lambda _, inputs, out: rows.append(out.shape[1]))
    scored(model, requests, max_tokens=10_000)
    longest = max(row_tokens(request, SHARED) for request in requests)
    assert read == [SHARED, len(requests) * longest]
    assert rows == [1, len(requests) * (1 + 1 + 3)]  # both choices' first tokens share one


def test_prompts_that_share_nothing_are_scored_too() -> None:
    model = tiny_model("llama")
    requests = [PromptRequest(r.tokens[SHARED:], r.choices) for r in prompt_request()]
    assert common_prefix(requests) == 0
    assert furthest(scored(model, requests), plain(model, requests)) < 1e-4


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_bf16_is_as_near_to_fp32_as_a_plain_forward_in_bf16(kind: str) -> None:
    model, requests = tiny_model(kind, initializer_range=0.05), prompt_request()
    exact = plain(model, requests)
    model = model.to(torch.bfloat16)
    error = furthest(scored(model, requests), exact)
    assert error < max(0.02, 2 * furthest(plain(model, requests), exact))


def test_adapters_are_heard() -> None:
    import peft

    base, requests = tiny_model("llama"), prompt_request()
    without = plain(base, requests)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    found = scored(model, requests)
    assert furthest(found, without) > 0.1
    assert furthest(found, plain(model, requests)) < 1e-4


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_virtual_tokens_come_before_the_prefix(kind: str) -> None:
    import peft

    base, requests = tiny_model(kind), prompt_request()
    without = plain(base, requests)
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16
    )
    model = peft.get_peft_model(base, config).eval()
    found = scored(model, requests)
    assert furthest(found, without) > 0.1
    assert furthest(found, plain(model, requests)) < 1e-4


def test_a_model_in_4_bits_is_scored_as_it_is(tmp_path: Path) -> None:
    tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
        device_map="cpu",
    ).eval()
    assert "4bit" in type(model.model.layers[0].mlp.up_proj).__name__
    requests = prompt_request()
    # bitsandbytes' CPU kernel rounds to bf16 inside: SDPA and eager are as far from each other.
    assert furthest(scored(model, requests), plain(model, requests)) < 0.02


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_it_runs_on_shapes_alone(kind: str) -> None:
    """For the planner: no step of it looks at a value."""
    with torch.device("meta"):
        model = tiny_model(kind)
    requests = prompt_request()
    scorer = Scorer(model, requests[0].tokens[:SHARED])
    assert scorer.log_likelihoods(requests).shape == (sum(len(r.choices) for r in requests),)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gives_what_a_plain_forward_gives(kind: str, dtype: torch.dtype) -> None:
    model, requests = tiny_model(kind, initializer_range=0.05).to("cuda", dtype), prompt_request()
    near = 1e-3 if dtype == torch.float32 else 0.1
    assert furthest(scored(model, requests), plain(model, requests)) < near


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_both_ways_to_attend_agree(causal: bool, masked: bool) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 13, 16)
    mask = (
        additive_mask(torch.rand(2, 1, 13, 13) < 0.7, torch.float32)
        if masked and not causal
        else None
    )
    one = attend(query, key, value, mask=mask, causal=causal, scale=0.3, softcap=None)
    other = eager(query, key, value, mask, causal, 0.3, None)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- lm-eval


SHOTS = "Review: a fine film\nLabel: good\n\nReview: what a bore\nLabel: bad\n\n"
QUERIES = ("moving", "not for me", "two hours that I want back", "well played")
PROMPTS = [f"{SHOTS}Review: {query}\nLabel:" for query in QUERIES]
LABELS = (" good", " bad", " neither of them")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind", ["llama", "gemma", "mistral", "gemma2", "gemma3_text", "qwen2", "gpt_neox", "opt"]
)
def test_likelihoods_and_choices_are_lm_evals(kind: str, tokenizer: Any) -> None:
    from lm_eval.models import huggingface as backends

    model = tiny_model(kind)
    theirs = backends.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=512)
    requests = [encode(tokenizer, prompt, LABELS) for prompt in PROMPTS]
    pairs = [
        (("", ""), *theirs._encode_pair(prompt, choice)) for prompt in PROMPTS for choice in LABELS
    ]
    assert [(r.tokens, c) for r in requests for c in r.choices] == [pair[1:] for pair in pairs]
    values = iter(theirs._loglikelihood_tokens(pairs, disable_tqdm=True))
    wanted = [[next(values)[0] for _ in request.choices] for request in requests]
    found = scored(model, requests)
    assert furthest(found, wanted) < 1e-4
    assert [row.index(max(row)) for row in found] == [row.index(max(row)) for row in wanted]


# ---------------------------------------------------------------- requests and batches


def test_spaces_that_end_a_prompt_go_to_the_choices(tokenizer: Any) -> None:
    request = encode(tokenizer, "Label: ", ["good", "bad"])
    assert tokenizer.decode(request.tokens) == "Label:"
    assert [tokenizer.decode(choice) for choice in request.choices] == [" good", " bad"]


def test_a_start_token_is_there_once(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    starting = transformers.AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    starting._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", starting.bos_token_id)]
    )
    plain_text, spelled = encode(starting, "a", ["b"]), encode(starting, "<s>a", ["b"])
    assert plain_text == spelled
    assert plain_text.tokens.count(starting.bos_token_id) == 1


def test_a_choice_that_adds_nothing_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="adds no token"):
        encode(tokenizer, "Label:", ["good", ""])
    with pytest.raises(ValueError, match="the prompt is empty"):
        encode(tokenizer, "", ["good"])


def test_each_prompt_keeps_a_token_of_its_own() -> None:
    assert common_prefix([PromptRequest([1, 2, 3], []), PromptRequest([1, 2, 4, 5], [])]) == 2
    assert common_prefix([PromptRequest([1, 2], []), PromptRequest([1, 2, 4], [])]) == 1
    assert common_prefix([PromptRequest([1, 2, 3], [])]) == 2
    assert common_prefix([PromptRequest([7], []), PromptRequest([8], [])]) == 0
    assert common_prefix([]) == 0


def test_batches_keep_to_their_budget_and_hold_every_request_once() -> None:
    requests = prompt_request(count=23)
    found = make_batches(requests, SHARED, 100)
    assert sorted(i for batch in found for i in batch) == list(range(23))
    lengths = [[row_tokens(requests[i], SHARED) for i in batch] for batch in found]
    assert all(len(batch) * max(batch) <= 100 for batch in lengths)
    flat = [length for batch in lengths for length in batch]
    assert flat == sorted(flat, reverse=True)
    assert make_batches(requests, SHARED, 1) == [[i] for batch in found for i in batch]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_each_rank_runs_as_many_batches(ranks: int) -> None:
    all_batches = make_batches(prompt_request(count=23), SHARED, 100)
    dealt = split_batches(all_batches, ranks)
    assert len({len(own) for own in dealt}) == 1
    assert {tuple(batch) for own in dealt for batch in own} == set(map(tuple, all_batches))
    assert split_batches([], ranks) == [[]] * ranks
