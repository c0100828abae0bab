"""Runs one side of the comparison in this process, so that its peak memory is its own.

    python benchmarks/fewshot/side.py hpcft|lm-eval CASE QUERIES BATCH

BATCH is the most tokens of a batch for hpcft, the batch size for lm-eval. Prints one JSON object.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

import torch
from cases import CASES

from hpcft.tasks.few_shot.batching import make_batches
from hpcft.tasks.few_shot.requests import PromptRequest, common_prefix_length
from hpcft.tasks.few_shot.scorer import Scorer


def hpcft(model: Any, requests: list[PromptRequest], max_tokens: int) -> list[list[float]]:
    """Scores requests with hpcft: finds and runs the common prefix, makes and runs batches."""
    length = common_prefix_length(requests)
    scorer = Scorer(model, requests[0].tokens[:length])
    scores: dict[int, list[float]] = {}
    for batch in make_batches(requests, scorer.shared_tokens, max_tokens):
        scores |= zip(batch, scorer.score([requests[i] for i in batch]), strict=True)
    return [scores[i] for i in range(len(requests))]


def lm_eval(backend: Any, requests: list[PromptRequest]) -> list[list[float]]:
    """Scores requests with lm-eval's HF backend, without its tokenising and its start."""
    pairs = [(("", ""), r.tokens, choice) for r in requests for choice in r.choices]
    scores = iter(backend._loglikelihood_tokens(pairs, disable_tqdm=True))
    return [[next(scores)[0] for _ in r.choices] for r in requests]


def main() -> None:
    """Runs one side; prints its seconds, peak memory and log-likelihoods as JSON."""
    name, number, queries, batch = sys.argv[1], *map(int, sys.argv[2:])
    torch.set_num_threads(1)
    case = CASES[number]
    model, requests = case.model(), case.requests(queries)
    if name == "lm-eval":
        from lm_eval.models.huggingface import HFLM
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        words = {"<pad>": 0, "<s>": 1, "</s>": 2}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
            pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        )  # fmt: skip
        backend = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, max_length=4096)
        model(torch.tensor([[1, 2, 3]]))
        started = time.perf_counter(), time.process_time()
        scores = lm_eval(backend, requests)
    else:
        model(torch.tensor([[1, 2, 3]]))
        started = time.perf_counter(), time.process_time()
        scores = hpcft(model, requests, batch)
    wall_s, cpu_s = time.perf_counter() - started[0], time.process_time() - started[1]
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {"wall_s": wall_s, "cpu_s": cpu_s, "peak_mib": peak_kib / 1024,
              "log_likelihoods": scores}  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
