"""Traces a batch of prompts on the meta device: its activations, logits and caches.

The real scorer runs the real module, with just enough layers to have every layer type: without
gradients, the live tensors of one layer are freed before those of the next.
"""

from __future__ import annotations

import warnings
from typing import Any

from hpcft.config.hf_model import build_model_config
from hpcft.planning.memory.trace_types import BatchMemory, PromptBatch
from hpcft.planning.memory.tracing.model import (
    build_model,
    four_bit_tensors,
    layer_period,
    layers_of,
)
from hpcft.planning.memory.tracing.storage_tracker import (
    ACTIVATIONS,
    DEQUANTISED,
    LOGITS,
    WEIGHTS,
    StorageTracker,
)
from hpcft.planning.memory.tracing.target_device import (
    TargetDevice,
    patched_kernels,
    scratch_estimator,
)
from hpcft.tasks.few_shot.requests import PromptRequest
from hpcft.tasks.few_shot.scorer import Scorer
from hpcft.tasks.few_shot.task import MAX_ROWS


def trace_batch(batch: PromptBatch) -> BatchMemory:
    """Returns the peak memory of a full batch: of the longest prompts, or of the most prompts."""
    task = batch.task
    config = build_model_config(batch.model, task, to_plan=True)
    layers = int(config.get_text_config().num_hidden_layers)
    # One layer more: the embeddings, the input of the first layer, live on in the later ones.
    depth = min(layers, 1 + layer_period(config, task.max_length))
    target = TargetDevice(batch.accelerator, batch.precision)
    model = build_model(
        config,
        task,
        batch.method,
        precision=batch.precision,
        zero_stage=0,
        depth=depth,
        checkpointing=False,
        attention=batch.model.attn_implementation,
    )
    # A tokenizer makes at most one token of a byte, and one of the space before the answer.
    choices = [len(text.encode()) + 1 for text in task.answer_texts]
    with warnings.catch_warnings(), patched_kernels(target, padded=True, zero_stage=0):
        warnings.simplefilter("ignore")
        scorer = Scorer(model, [0])
        caches = [tensor for pair in scorer.prefix.layers for tensor in pair]
        peaks = [
            peak_bytes(scorer, rows, tokens, choices)
            for rows, tokens in batch_shapes(batch.prompts, task.max_length, choices)
        ]
    activations, dequantised, _ = max(peaks)
    return BatchMemory(
        activation_bytes=activations,
        dequantised_bytes=dequantised,
        logits_bytes=max(with_logits for *_, with_logits in peaks) - activations,
        kv_bytes_per_token=sum(t.nbytes for t in caches) * layers // depth,
        copies_prefix=scorer.prefix.sharing != "cascade",
    )


def batch_shapes(prompts: int, window: int, choices: list[int]) -> list[tuple[int, int]]:
    """Returns rows and tokens per row of a full batch: with the fewest and the most rows.

    The tokens of a row are those of its own prompt, without the shared shots and the choices.

    Args:
        prompts: number of prompts of the window's length that a batch has room for.
        window: tokens of a prompt with its answer.
        choices: tokens of each choice. The model runs all of them but the last.
    """
    room, choice_tokens = prompts * window, sum(choices) - len(choices)
    longest = max(1, window - max(choices))
    max_rows = max(1, min(MAX_ROWS, room // (1 + choice_tokens)))
    # A prompt that is longer than the room runs alone.
    return [
        (rows, longest if rows == 1 else min(longest, room // rows - choice_tokens))
        for rows in sorted({min(prompts, max_rows), max_rows})
    ]


def peak_bytes(scorer: Scorer, rows: int, tokens: int, choices: list[int]) -> tuple[int, int, int]:
    """Returns the peaks of a batch in bytes: without logits, its dequantised part, with logits.

    Args:
        scorer: scorer of the model on the meta device, or on a CPU.
        rows: prompts of the batch.
        tokens: tokens of each prompt, without the shared shots and the choices.
        choices: tokens of each choice.
    """
    requests = [PromptRequest([0] * (tokens + 1), [[0] * n for n in choices]) for _ in range(rows)]
    tracker = StorageTracker(scratch_estimator(1), 1)
    model = scorer.model
    tracker.seed([*model.parameters(), *model.buffers()], WEIGHTS)
    tracker.seed(four_bit_tensors(model), WEIGHTS)
    tracker.seed([tensor for pair in scorer.prefix.layers for tensor in pair], WEIGHTS)

    def enter_head(*_: Any) -> None:
        tracker.kind = LOGITS

    last = layers_of(model, model.config.get_text_config().num_hidden_layers)[-1]
    hook = last.register_forward_hook(enter_head)
    try:
        with tracker:
            tracker.is_recording = True
            tracker.begin_segment("batch")
            scorer.log_likelihoods(requests)
    finally:
        hook.remove()
    samples = [
        (sizes[ACTIVATIONS] + sizes[DEQUANTISED], sizes[DEQUANTISED], sizes[LOGITS])
        for sizes, _ in tracker.segments["batch"]
    ]
    activations, dequantised, _ = max(samples)
    return activations, dequantised, max(size + logits for size, _, logits in samples)
