"""A batch of prompts on the meta device: what its forward pass takes beside weights and caches.

The real scorer runs the real module, with as few layers as have all types: without gradients, what
is alive in one layer does not add to what is alive in the next.
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
from hpcft.planning.memory.tracing.target_device import Target, kernels, scratch
from hpcft.tasks.few_shot.requests import PromptRequest
from hpcft.tasks.few_shot.scorer import Scorer
from hpcft.tasks.few_shot.task import MAX_ROWS


def trace_batch(batch: PromptBatch) -> BatchMemory:
    """What a batch takes at the worst: prompts as long as may be, or as many."""
    task = batch.task
    config = build_model_config(batch.model, task, to_plan=True)
    layers = int(config.get_text_config().num_hidden_layers)
    # One more than all types: the embeddings are the first layer's input, and stay beside others'.
    depth = min(layers, 1 + layer_period(config, task.max_length))
    target = Target(batch.accelerator, batch.precision)
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
    choices = [len(word.encode()) + 1 for word in task.words]
    with warnings.catch_warnings(), kernels(target, padded=True, zero_stage=0):
        warnings.simplefilter("ignore")
        scorer = Scorer(model, [0])
        caches = [tensor for pair in scorer.prefix.layers for tensor in pair]
        points = [
            _peaks(scorer, target, rows, own, choices)
            for rows, own in shapes(batch.prompts, task.max_length, choices)
        ]
    activations, dequantised, _ = max(points)
    return BatchMemory(
        activations=activations,
        dequantised=dequantised,
        logits=max(most for *_, most in points) - activations,
        token=sum(t.nbytes for t in caches) * layers // depth,
        copies=scorer.prefix.sharing != "cascade",
    )


def shapes(prompts: int, window: int, choices: list[int]) -> list[tuple[int, int]]:
    """Rows of a full batch, and tokens of each beside shots and choices: fewest rows, and most.

    Args:
        prompts: those of the window's length that a batch has room for.
        window: tokens of a prompt with its answer.
        choices: tokens of each choice. All but its last are run.
    """
    room, run = prompts * window, sum(choices) - len(choices)
    longest = max(1, window - max(choices))
    most = max(1, min(MAX_ROWS, room // (1 + run)))
    # A prompt that is longer than the room runs alone.
    return [
        (rows, longest if rows == 1 else min(longest, room // rows - run))
        for rows in sorted({min(prompts, most), most})
    ]


def _peaks(
    scorer: Scorer, target: Target, rows: int, own: int, choices: list[int]
) -> tuple[int, int, int]:
    """The most activations, dequantised weights among them, and the most with logits."""
    requests = [PromptRequest([0] * (own + 1), [[0] * n for n in choices]) for _ in range(rows)]
    tracker = StorageTracker(scratch(target, 1), 1)
    model = scorer.model
    tracker.seed([*model.parameters(), *model.buffers()], WEIGHTS)
    tracker.seed(four_bit_tensors(model), WEIGHTS)
    tracker.seed([tensor for pair in scorer.prefix.layers for tensor in pair], WEIGHTS)

    def head(*_: Any) -> None:
        tracker.kind = LOGITS

    last = layers_of(model, model.config.get_text_config().num_hidden_layers)[-1]
    hook = last.register_forward_hook(head)
    try:
        with tracker:
            tracker.recording = True
            tracker.segment("batch")
            scorer.log_likelihoods(requests)
    finally:
        hook.remove()
    moments = [sizes for sizes, _ in tracker.segments["batch"]]
    working = [(s[ACTIVATIONS] + s[DEQUANTISED], s[DEQUANTISED], s[LOGITS]) for s in moments]
    activations, dequantised, _ = max(working)
    return activations, dequantised, max(size + logits for size, _, logits in working)
