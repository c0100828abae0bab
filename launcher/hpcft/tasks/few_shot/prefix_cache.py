"""Runs the tokens that all prompts begin with once, and keeps their keys and values."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Sharing = Literal["cascade", "expanded", "none"]

CASCADE_MODEL_TYPES = frozenset(
    {"gemma", "gemma2", "gemma3_text", "gpt_neox", "llama", "mistral", "mixtral", "opt", "phi3",
     "qwen2", "qwen3"}
)  # fmt: skip
"""Model types whose attention is what `cascade_attention` computes.

Each is tested against a plain forward pass; any other type gets a copy of the cache for each row.
"""


@dataclass(frozen=True)
class Prefix:
    """Holds what a model keeps of the tokens that all prompts begin with."""

    tokens: list[int]
    """Shared tokens, which no batch runs again."""

    length: int
    """Number of positions before a row's first: shared tokens and an adapter's virtual ones."""

    sharing: Sharing
    """Way in which rows read the prefix. `cascade`: all rows read one copy. `expanded`: each row
    has a copy, which any causal model of transformers understands. `none`: each row runs its whole
    prompt, alone."""

    cache: Any = None
    """Cache that the model returned; None if nothing was run."""

    @property
    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, (1, K, P, D); a sliding layer holds only its last ones."""
        return [(layer.keys, layer.values) for layer in self.cache.layers] if self.cache else []

    def expand_cache(self, rows: int) -> Any:
        """Returns a cache of so many rows, each with its own copy of the prefix; None if empty."""
        cache = copy.deepcopy(self.cache)
        if cache is not None:
            cache.batch_repeat_interleave(rows)
        return cache


@torch.no_grad()
def run_prefix(model: Any, tokens: Sequence[int]) -> Prefix:
    """Runs the shared tokens through the model and keeps what later tokens read of them."""
    sharing = _sharing_of(model.config)
    if sharing == "none" or (not tokens and model_after_prefix(model) is not model):
        return Prefix([], 0, "none")
    if not tokens:
        return Prefix([], 0, sharing)
    ids = torch.tensor([list(tokens)], device=input_device(model))
    cache = getattr(model(input_ids=ids, use_cache=True, logits_to_keep=1), "past_key_values", None)
    if cache is None:
        return Prefix([], 0, "none")
    return Prefix(list(tokens), cache.get_seq_length(), sharing, cache)


def _sharing_of(config: Any) -> Sharing:
    """Returns how rows of such a model can share the prefix."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if kinds & {"dynamic", "longrope"}:
        return "none"  # its keys depend on the length of the whole text
    is_bidirectional = getattr(text, "use_bidirectional_attention", False)
    if config.model_type in CASCADE_MODEL_TYPES and not is_bidirectional:
        return "cascade"
    return "expanded"


def model_after_prefix(model: Any) -> Any:
    """Returns the model that runs the tokens after the prefix, without virtual tokens.

    P-tuning and prompt tuning put virtual tokens before whatever they run; here the prefix has
    them already.
    """
    adapter = getattr(model, "active_peft_config", None)
    return model.get_base_model() if getattr(adapter, "is_prompt_learning", False) else model


def input_device(model: Any) -> torch.device:
    """Returns the device of the model's inputs."""
    return model.get_input_embeddings().weight.device  # type: ignore[no-any-return]
