"""Memory of a rank that asks a model and trains nothing: weights, caches, and one batch.

P is all parameters, Q those held in 4 bits, A those of an adapter, N the ranks, w the bytes of a
weight, L the layers, K the heads of keys and values, D a head's width, S `max_length`, B the
prompts of that length that a batch may hold. Shorter prompts are more to a batch, with no more
tokens in all.
"""

from __future__ import annotations

import importlib.metadata
import json

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.disk_cache import cached
from hpcft.core.records import Layout, MemoryItem, ModelFacts, Precision
from hpcft.methods import AnyMethod
from hpcft.methods.base import COMPUTE_BYTES
from hpcft.planning.memory import model_states, zero_memory
from hpcft.planning.memory.cache_key import adapter_config_content, model_config_content
from hpcft.planning.memory.import_stubs import gc_paused, meta_imports
from hpcft.planning.memory.trace_errors import translate_trace_errors
from hpcft.planning.memory.trace_types import BatchMemory, PromptBatch
from hpcft.tasks.few_shot.task import MAX_ROWS

TRACING = 3  # raised when what is traced changes, so that earlier cache files are not read
# Of generated answers a draw takes the logits in fp64 as they are, as shares, and summed up.
DRAWING_BYTES = 3 * 8


def few_shot_items(
    recipe: FullRecipe, layout: Layout, facts: ModelFacts, precision: Precision, accelerator: str
) -> list[MemoryItem]:
    """What is on a rank's device while a batch is asked."""
    task = recipe.task.as_few_shot
    batch = PromptBatch(
        model=recipe.model,
        task=task,
        method=recipe.method,
        precision=precision,
        accelerator=accelerator,
        prompts=layout.per_device_train_batch_size,
    )
    known = batch_memory(batch)
    tokens = batch.prompts * task.max_length
    found = _weights(recipe.method, facts, layout, precision)

    def item(name: str, size_bytes: float, rule: str) -> None:
        found.append(MemoryItem(name=name, bytes=int(size_bytes), rule=rule))

    # Keys and values: 2 × K × D × w bytes a token and layer (Pope et al. 2022, arXiv:2211.05102).
    each = f"2 × L × K × D × w = {known.token:,} bytes a token"
    item("KV cache of the shots", known.token * task.max_length, f"{each} × S {task.max_length:,}")
    generates = task.answer == "generation"
    if generates or known.copies:
        item("KV cache of the batch", known.token * tokens, f"{each} × {tokens:,} of the batch")
    rule = f"traced: {tokens:,} tokens in a batch"
    item("activations", known.activations - known.dequantised, rule)
    if known.dequantised:
        item("dequantised weights", known.dequantised, rule)
    if generates:
        size = MAX_ROWS * facts.vocab_size * (COMPUTE_BYTES[precision] + DRAWING_BYTES)
        item("logits", size, f"{MAX_ROWS} rows × V {facts.vocab_size:,} × (w + {DRAWING_BYTES})")
    elif known.logits:
        rule = "traced: where a choice's token is asked for, beyond the activations"
        item("logits", known.logits, rule)
    return found


def _weights(
    method: AnyMethod, facts: ModelFacts, layout: Layout, precision: Precision
) -> list[MemoryItem]:
    p, n, w = facts.parameters, layout.world_size, COMPUTE_BYTES[precision]
    if layout.zero_stage == 0:
        own = p.total - p.quantised - p.added
        rest = "(P − Q − A)" if p.quantised or p.added else "P"
        found = [MemoryItem(name="weights", bytes=w * own, rule=f"{w} bytes × {rest} {own:,}")]
        if p.quantised:
            each = model_states.four_bit_bytes(method)
            rule = f"{each:.3f} bytes × Q {p.quantised:,}"
            size = int(each * p.quantised)
            found.append(MemoryItem(name="4-bit weights", bytes=size, rule=rule))
        if p.added:  # PEFT loads them in fp32, whatever the model is in
            rule = f"4 bytes × A {p.added:,}"
            found.append(MemoryItem(name="adapters", bytes=4 * p.added, rule=rule))
        return found
    sizes = zero_memory.zero_sizes(facts, recomputes=False)
    ahead = sizes.max_live_elements + sizes.prefetch_bucket_elements
    # The table of a large vocabulary is gathered whole, and more layers ahead of their use.
    whole = min(ahead + p.largest_layer, p.total)
    found = [
        MemoryItem(
            name="ZeRO gathers and buckets",
            bytes=w * whole,
            rule=f"{w} bytes × {whole:,}: layers gathered ahead, and the largest module",
        )
    ]
    if layout.offload_param == "none":
        rule = f"{w} bytes × P {p.total:,} / N {n}"
        found.append(MemoryItem(name="weight shards", bytes=w * p.total // n, rule=rule))
    return found


def batch_memory(batch: PromptBatch) -> BatchMemory:
    """What a batch takes; traced where it is not cached.

    Raises:
        DataError: the model cannot be traced.
    """
    return cached("batches", _key(batch), BatchMemory, lambda: _traced(batch))


def _key(batch: PromptBatch) -> str:
    task = batch.task
    return json.dumps(
        [
            TRACING,
            [importlib.metadata.version(p) for p in ("torch", "transformers")],
            batch.model_dump(mode="json", exclude={"task": True, "model": {"tokenizer"}}),
            [task.max_length, task.words, task.answer],
            model_config_content(batch.model),
            adapter_config_content(batch.method),
        ],
        sort_keys=True,
    )


@gc_paused()
@meta_imports()
def _traced(batch: PromptBatch) -> BatchMemory:
    from hpcft.planning.memory.tracing.few_shot import trace_batch

    with translate_trace_errors("asking it", "another model, or attn_implementation: eager"):
        return trace_batch(batch)
