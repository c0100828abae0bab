"""Counts a model's parameters from its configuration, on the meta device, without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hpcft.core.disk_cache import load_or_compute
from hpcft.core.records import ModelFacts, ModelSpec, ParameterCount
from hpcft.methods import AnyMethod
from hpcft.methods.saved_weights import check_shapes
from hpcft.planning.memory.cache_key import adapter_config_content, model_config_content
from hpcft.planning.memory.import_stubs import meta_imports
from hpcft.planning.memory.meta_model import apply_method, build_on_meta
from hpcft.planning.vocabulary import check_vocabulary
from hpcft.tasks.base import TaskBase

FACTS_VERSION = 9  # raised when what is counted changes, so that earlier cache files are not read
SHARD_BYTES = 5 * 2**30  # size of the files into which published models are commonly split


def compute_model_facts(model: ModelSpec, task: TaskBase, method: AnyMethod) -> ModelFacts:
    """Returns a model's counts and dimensions; computed once, then read from the cache.

    Raises:
        ModelConfigError: the recipe describes a model with a wrong field.
        DataError: the model does not exist, the method cannot train it, or its weights or its
            tokenizer do not fit it.
    """
    key = json.dumps(
        [
            FACTS_VERSION,
            model.model_dump(mode="json", exclude={"tokenizer"}),
            model_config_content(model),
            task.head().auto_class,
            dict(task.head().config),
            method.model_dump(mode="json"),
            adapter_config_content(method),
        ],
        sort_keys=True,
    )
    facts = load_or_compute("facts", key, ModelFacts, lambda: _count(model, task, method))
    check_vocabulary(model, facts.vocab_size)
    return facts


def largest_weight_file_bytes(model: ModelSpec, facts: ModelFacts) -> int:
    """Returns what a rank reads at once when loading: the largest weight file, in bytes.

    Where the files are not there yet, it is `SHARD_BYTES` or all weights in fp32.
    """
    folder = Path(model.path or "")
    if model.path and folder.is_dir():
        return max((f.stat().st_size for f in folder.glob("*.safetensors")), default=0)
    return min(4 * facts.parameters.total, SHARD_BYTES)


@meta_imports()
def _count(model: ModelSpec, task: TaskBase, method: AnyMethod) -> ModelFacts:
    bare = build_on_meta(model, task)
    config = bare.config
    text = config.get_text_config()
    return ModelFacts(
        model_type=config.model_type,
        parameters=_count_parameters(bare, model, task, method),
        layers=_first_integer(text, "num_hidden_layers", "n_layers", "n_layer"),
        hidden_size=_first_integer(text, "hidden_size", "dim", "n_embd", "d_model"),
        vocab_size=_first_integer(text, "vocab_size"),
        logits_width=task.head().outputs or _first_integer(text, "vocab_size"),
        max_positions=_max_positions(bare, getattr(text, "max_position_embeddings", None)),
        supports_chunked_loss=_supports_chunked_loss(config, task),
    )


def _count_parameters(
    bare: Any, model: ModelSpec, task: TaskBase, method: AnyMethod
) -> ParameterCount:
    """Returns the counts of a model on the meta device, to which it applies the method."""
    quantised = method.quantised_parameters(bare)
    largest_module = max(
        sum(p.numel() for p in module.parameters(recurse=False)) for module in bare.modules()
    )
    head = _head_parameters(bare) if task.head().outputs is not None else 0
    pretrained = {id(p) for p in bare.parameters()}
    is_local = model.path is not None and Path(model.path).is_dir()
    if model.path and is_local:
        check_shapes(bare, model.path)
    wrapped = apply_method(bare, task, method)
    method.check_saved_weights(wrapped, model.path if is_local else None)
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    # An adapter adds PEFT's updates and its copy of the head. The head itself stays, frozen and
    # unused, and counts in `total` only.
    adapter = sum(p.numel() for p in wrapped.parameters() if id(p) not in pretrained)
    return ParameterCount(
        total=_total(wrapped),
        trainable=sum(p.numel() for p in trained),
        added=adapter if method.saves_adapter else head,
        largest_layer=largest_module,
        trained_tensors=[p.numel() for p in trained if p.dim() > 1],
        trained_vectors=[p.numel() for p in trained if p.dim() <= 1],
        largest_trained=max((p.numel() for p in trained), default=0),
        layer=_layer_parameters(bare),
        quantised=quantised,
        embedding_parameters=_embedding_parameters(bare),
    )


def _layer_parameters(model: Any) -> int:
    """Returns the parameters of the largest module in the model's largest list of modules."""
    import torch

    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    return max((_total(layer) for layer in max(lists, key=_total, default=[])), default=0)


def _total(model: Any) -> int:
    """Returns the number of all parameters; `parameters()` gives a tied weight once."""
    return sum(p.numel() for p in model.parameters())


def _embedding_parameters(model: Any) -> int:
    """Returns the parameters of embedding tables that no linear layer shares."""
    import torch

    linear = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    tables = {id(m.weight): m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    return sum(weight.numel() for key, weight in tables.items() if key not in linear)


def _head_parameters(model: Any) -> int:
    """Returns the parameters outside the base model, which the task's head adds."""
    base = getattr(model, model.base_model_prefix, None)
    return _total(model) - _total(base) if base is not None and base is not model else 0


def _max_positions(model: Any, declared: int | None) -> int | None:
    """Returns the tokens that fit; RoBERTa and its kin reserve positions up to the padding's."""
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if declared and padding is not None and name.endswith("position_embeddings"):
            return declared - int(padding) - 1
    return declared


def _supports_chunked_loss(config: Any, task: TaskBase) -> bool:
    """Returns whether the loss can be computed in parts, which only a language model's can."""
    if not task.causal or task.head().outputs is not None:
        return False
    # Imported here, because it imports torch, which a plan from the cache does without.
    from hpcft.planning.memory.tracing.output_layer import loss_can_be_chunked

    return loss_can_be_chunked(config, task)


def _first_integer(config: Any, *names: str) -> int:
    """Returns the first of these fields that a configuration has; 0 if it has none."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return 0
