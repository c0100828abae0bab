"""What all prompts share, run once: its keys and values, and how batches may read them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Sharing = Literal["cascade", "expanded", "none"]

CASCADE = frozenset(
    {"gemma", "gemma2", "gemma3_text", "gpt_neox", "llama", "mistral", "mixtral", "opt", "phi3",
     "qwen2", "qwen3"}
)  # fmt: skip
"""Model types whose attention is no more than `attention.cascade` computes. Each is tested against
a plain forward; any other is served by a copy of the cache for each row."""


@dataclass(frozen=True)
class Prefix:
    """What a model keeps of the tokens that all prompts begin with."""

    tokens: list[int]
    """The shared tokens: those of each prompt that no batch runs again."""

    length: int
    """Positions before the first of a row: the shared tokens, and an adapter's virtual ones."""

    sharing: Sharing
    """`cascade`: all rows read one copy. `expanded`: each row has its own copy, which any causal
    model of transformers understands. `none`: each row runs its whole prompt, alone."""

    cache: Any = None
    """The cache that the model returned; None where nothing was run."""

    @property
    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, (1, K, P, D); a sliding layer holds its last ones only."""
        return [(layer.keys, layer.values) for layer in self.cache.layers] if self.cache else []

    def copies(self, rows: int) -> Any:
        """A cache of so many rows, each with its own copy of the prefix."""
        cache = copy.deepcopy(self.cache)
        if cache is not None:
            cache.batch_repeat_interleave(rows)
        return cache


@torch.no_grad()
def run_prefix(model: Any, tokens: Sequence[int]) -> Prefix:
    """Run the shared tokens through the model, once, and keep what later tokens read of them."""
    way = _way(model.config)
    if way == "none" or (not tokens and reader(model) is not model):
        return Prefix([], 0, "none")
    if not tokens:
        return Prefix([], 0, way)
    ids = torch.tensor([list(tokens)], device=device_of(model))
    cache = getattr(model(input_ids=ids, use_cache=True, logits_to_keep=1), "past_key_values", None)
    if cache is None:
        return Prefix([], 0, "none")
    return Prefix(list(tokens), cache.get_seq_length(), way, cache)


def _way(config: Any) -> Sharing:
    """How the prefix of such a model can be shared."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if kinds & {"dynamic", "longrope"}:
        return "none"  # what it keeps of a token depends on the length of the whole
    if config.model_type in CASCADE and not getattr(text, "use_bidirectional_attention", False):
        return "cascade"
    return "expanded"


def reader(model: Any) -> Any:
    """What runs the tokens after the prefix: the model, without an adapter's virtual tokens.

    P-tuning and its like put virtual tokens before whatever they run; here the prefix has them.
    """
    adapter = getattr(model, "active_peft_config", None)
    return model.get_base_model() if getattr(adapter, "is_prompt_learning", False) else model


def device_of(model: Any) -> torch.device:
    """Where the model's inputs belong."""
    return model.get_input_embeddings().weight.device  # type: ignore[no-any-return]
