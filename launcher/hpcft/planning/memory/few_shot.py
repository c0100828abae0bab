"""Computes a rank's memory in few-shot prompting: weights, KV caches, and one batch.

P is all parameters, Q those held in 4 bits, A those of an adapter, N the ranks, w the bytes of a
weight, V the vocabulary, L the layers, K the heads of keys and values, D a head's width and S
`max_length`. A batch has room for a number of prompts of S tokens; it may hold more prompts that
are shorter, with no more tokens in total.
"""

from __future__ import annotations

import importlib.metadata
import json

from hpcft.core.disk_cache import load_or_compute
from hpcft.core.records import Layout, MemoryItem
from hpcft.methods.base import COMPUTE_BYTES
from hpcft.planning.inputs import PlanInputs
from hpcft.planning.memory import model_states, zero_memory
from hpcft.planning.memory.cache_key import adapter_config_content, model_config_content
from hpcft.planning.memory.import_stubs import meta_imports
from hpcft.planning.memory.trace_errors import translate_trace_errors
from hpcft.planning.memory.trace_types import BatchMemory, PromptBatch
from hpcft.tasks.few_shot.task import MAX_ROWS

# Version of the traces: it rises when they or their stored form change, so that cache files of an
# earlier hpcft are not read.
TRACING = 4
# Sampling a generated token holds fp64 copies of the logits: scaled, as probabilities, and their
# running sum.
SAMPLING_BYTES = 3 * 8


def few_shot_items(inputs: PlanInputs, layout: Layout) -> list[MemoryItem]:
    """Returns the tensors of a rank while it runs a batch of prompts, by component."""
    task = inputs.recipe.few_shot_task
    batch = PromptBatch(
        model=inputs.recipe.model,
        task=task,
        method=inputs.method,
        precision=inputs.precision,
        accelerator=inputs.cluster.accelerator,
        prompts=layout.per_device_train_batch_size,
    )
    memory = batch_memory(batch)
    tokens = batch.prompts * task.max_length
    items = _weights(inputs, layout)

    def add(name: str, size_bytes: float, rule: str) -> None:
        items.append(MemoryItem(name=name, bytes=int(size_bytes), rule=rule))

    # Keys and values: 2 × K × D × w bytes a token and layer (Pope et al. 2022, arXiv:2211.05102).
    per_token = memory.kv_bytes_per_token
    each = f"2 × L × K × D × w = {per_token:,} bytes a token"
    add("KV cache of the shots", per_token * task.max_length, f"{each} × S {task.max_length:,}")
    generates = task.answer == "generation"
    if generates or memory.copies_prefix:
        add("KV cache of the batch", per_token * tokens, f"{each} × {tokens:,} of the batch")
    rule = f"traced: {tokens:,} tokens in a batch"
    add("activations", memory.activation_bytes - memory.dequantised_bytes, rule)
    if memory.dequantised_bytes:
        add("dequantised weights", memory.dequantised_bytes, rule)
    if generates:
        vocab_size = inputs.facts.vocab_size
        size = MAX_ROWS * vocab_size * (COMPUTE_BYTES[inputs.precision] + SAMPLING_BYTES)
        add("logits", size, f"{MAX_ROWS} rows × V {vocab_size:,} × (w + {SAMPLING_BYTES})")
    elif memory.logits_bytes:
        rule = "traced: output layer at the positions of labels, beyond the activations"
        add("logits", memory.logits_bytes, rule)
    return items


def _weights(inputs: PlanInputs, layout: Layout) -> list[MemoryItem]:
    p, n, w = inputs.facts.parameters, layout.world_size, COMPUTE_BYTES[inputs.precision]
    if layout.zero_stage == 0:
        own = p.total - p.quantised - p.added
        rest = "(P − Q − A)" if p.quantised or p.added else "P"
        items = [MemoryItem(name="weights", bytes=w * own, rule=f"{w} bytes × {rest} {own:,}")]
        if p.quantised:
            each = model_states.four_bit_bytes(inputs.method)
            rule = f"{each:.3f} bytes × Q {p.quantised:,}"
            size = int(each * p.quantised)
            items.append(MemoryItem(name="4-bit weights", bytes=size, rule=rule))
        if p.added:  # PEFT loads adapters in fp32, whatever the type of the model.
            rule = f"4 bytes × A {p.added:,}"
            items.append(MemoryItem(name="adapters", bytes=4 * p.added, rule=rule))
        return items
    sizes = zero_memory.zero_sizes(inputs.facts, layout)
    ahead = sizes.max_live_elements + sizes.prefetch_bucket_elements
    # Layers are gathered ahead of their use, and the embeddings of a large vocabulary as a whole.
    gathered = min(ahead + p.largest_layer, p.total)
    items = [
        MemoryItem(
            name="ZeRO gathers and buckets",
            bytes=w * gathered,
            rule=f"{w} bytes × {gathered:,}: layers gathered ahead, and the largest module",
        )
    ]
    if layout.offload_param == "none":
        rule = f"{w} bytes × P {p.total:,} / N {n}"
        items.append(MemoryItem(name="weight shards", bytes=w * p.total // n, rule=rule))
    return items


def batch_memory(batch: PromptBatch) -> BatchMemory:
    """Returns the memory of a batch of prompts, from the cache or a new trace.

    Raises:
        DataError: the model cannot be traced.
    """
    return load_or_compute("batches", _cache_key(batch), BatchMemory, lambda: _trace(batch))


def _cache_key(batch: PromptBatch) -> str:
    task = batch.task
    return json.dumps(
        [
            TRACING,
            [importlib.metadata.version(p) for p in ("torch", "transformers")],
            batch.model_dump(mode="json", exclude={"task": True, "model": {"tokenizer"}}),
            [task.max_length, task.answer_texts, task.answer],
            model_config_content(batch.model),
            adapter_config_content(batch.method),
        ],
        sort_keys=True,
    )


@meta_imports()
def _trace(batch: PromptBatch) -> BatchMemory:
    # Imported here, because tracing imports torch, which a cached batch does not need.
    from hpcft.planning.memory.tracing.few_shot import trace_batch

    with translate_trace_errors("a forward pass", "another model, or attn_implementation: eager"):
        return trace_batch(batch)
