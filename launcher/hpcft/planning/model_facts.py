"""Exact parameter counts from a configuration, on the meta device: no weights, no memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hpcft.core.disk_cache import cached
from hpcft.core.records import ModelFacts, ModelSpec, ParameterCount
from hpcft.methods import AnyMethod
from hpcft.planning.memory.cache_key import adapter_config_content, model_config_content
from hpcft.planning.memory.import_stubs import gc_paused, meta_imports
from hpcft.planning.memory.meta_model import apply_method, build_on_meta
from hpcft.tasks.base import TaskBase

COUNTING = 8  # raised when what is counted changes, so that earlier cache files are not read


def compute_model_facts(model: ModelSpec, task: TaskBase, method: AnyMethod) -> ModelFacts:
    """What planning has to know of a model; counted once, then read from the cache."""
    key = json.dumps(
        [
            COUNTING,
            model.model_dump(mode="json", exclude={"tokenizer"}),
            model_config_content(model),
            task.head().auto_class,
            dict(task.head().config),
            method.model_dump(mode="json"),
            adapter_config_content(method),
        ],
        sort_keys=True,
    )
    return cached("facts", key, ModelFacts, lambda: _count(model, task, method))


def largest_weight_file_bytes(model: ModelSpec, facts: ModelFacts) -> int:
    """What a rank reads at once when loading: the largest weight file, else 5 GiB or the model.

    5 GiB is the shard size at which published models are commonly split.
    """
    folder = Path(model.path or "")
    if model.path and folder.is_dir():
        return max((f.stat().st_size for f in folder.glob("*.safetensors")), default=0)
    return min(4 * facts.parameters.total, 5 * 2**30)


@gc_paused()
@meta_imports()
def _count(model: ModelSpec, task: TaskBase, method: AnyMethod) -> ModelFacts:
    bare = build_on_meta(model, task)
    config = bare.config
    quantised = method.quantised_parameters(bare)
    largest = max(
        sum(p.numel() for p in module.parameters(recurse=False)) for module in bare.modules()
    )
    head_only = _head_parameters(bare) if task.head().outputs is not None else 0
    pretrained = {id(p) for p in bare.parameters()}
    wrapped = apply_method(bare, task, method)
    method.check_saved(wrapped, model.path if model.path and Path(model.path).is_dir() else None)
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    trainable = sum(p.numel() for p in trained)
    text = config.get_text_config()
    return ModelFacts(
        model_type=config.model_type,
        parameters=ParameterCount(
            total=_total(wrapped),
            trainable=trainable,
            # Of an adapter: PEFT's updates, and its copy of the head (the head itself stays, frozen
            # and unused, and counts in `total` only).
            added=sum(p.numel() for p in wrapped.parameters() if id(p) not in pretrained)
            if method.adapter
            else head_only,
            largest_layer=largest,
            trained_tensors=[p.numel() for p in trained if p.dim() > 1],
            trained_vectors=[p.numel() for p in trained if p.dim() <= 1],
            largest_trained=max((p.numel() for p in trained), default=0),
            layer=_layer_parameters(bare),
            quantised=quantised,
            embedding_parameters=_looked_up(bare),
        ),
        layers=_first(text, "num_hidden_layers", "n_layers", "n_layer"),
        hidden_size=_first(text, "hidden_size", "dim", "n_embd", "d_model"),
        vocab_size=_first(text, "vocab_size"),
        logits_width=task.head().outputs or _first(text, "vocab_size"),
        max_positions=_max_positions(bare, getattr(text, "max_position_embeddings", None)),
        supports_chunked_loss=_loss_in_parts(config, task),
    )


def _layer_parameters(model: Any) -> int:
    """Parameters of the largest layer: of a module in the model's largest list of modules."""
    import torch

    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    return max((_total(layer) for layer in max(lists, key=_total, default=[])), default=0)


def _total(model: Any) -> int:
    """All parameters; `parameters()` gives a tied weight once."""
    return sum(p.numel() for p in model.parameters())


def _looked_up(model: Any) -> int:
    """Parameters of embedding tables that no linear layer shares."""
    import torch

    linear = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    tables = {id(m.weight): m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    return sum(weight.numel() for key, weight in tables.items() if key not in linear)


def _head_parameters(model: Any) -> int:
    """Parameters outside the base model: those that the task's head adds."""
    base = getattr(model, model.base_model_prefix, None)
    return _total(model) - _total(base) if base is not None and base is not model else 0


def _max_positions(model: Any, declared: int | None) -> int | None:
    """Tokens that fit: RoBERTa and its kin count positions from behind the padding's own one."""
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if declared and padding is not None and name.endswith("position_embeddings"):
            return declared - int(padding) - 1
    return declared


def _loss_in_parts(config: Any, task: TaskBase) -> bool:
    """Whether the loss can be computed in parts: that of the next tokens alone can."""
    if not task.causal or task.head().outputs is not None:
        return False
    from hpcft.planning.memory.tracing.output_layer import loss_can_be_chunked

    return loss_can_be_chunked(config, task)


def _first(config: Any, *names: str) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return 0
