"""Models, prompts and choices for both sides of the comparison."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpcft.tasks.few_shot.requests import PromptRequest

SHOTS, SHOT_TOKENS = 8, 200
QUERY_TOKENS = (80, 120)
"""Smallest and largest number of tokens; 100 on average."""


@dataclass(frozen=True)
class Case:
    """One model with one kind of label."""

    name: str
    shape: Mapping[str, Any]
    """Model type, and the fields of its configuration that differ between cases."""
    vocabulary: int
    """Size of the vocabulary."""
    label_tokens: tuple[int, ...]
    """Possible numbers of tokens of each of the two labels."""
    bar: float
    """Required ratio of examples per second to lm-eval's."""

    def model(self) -> Any:
        """Builds a random model in fp32."""
        import torch
        import transformers

        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(
            **self.shape, vocab_size=self.vocabulary, max_position_embeddings=4096,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        return transformers.AutoModelForCausalLM.from_config(config).eval()

    def requests(self, queries: int) -> list[PromptRequest]:
        """Returns the same prompts on every call: 8 common shots, a query and two labels each."""
        rng = random.Random(0)

        def tokens(count: int) -> list[int]:
            return [rng.randrange(3, self.vocabulary) for _ in range(count)]

        shots = [1, *tokens(SHOTS * SHOT_TOKENS)]
        labels = [tokens(rng.choice(self.label_tokens)) for _ in range(2)]
        return [
            PromptRequest(shots + tokens(rng.randint(*QUERY_TOKENS)), labels)
            for _ in range(queries)
        ]


LLAMA = {
    "model_type": "llama", "hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1408,
    "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip
_GEMMA = {
    "model_type": "gemma", "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128,
}  # fmt: skip
DEEP = {**_GEMMA, "hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 2560}
WIDE = {**_GEMMA, "hidden_size": 640, "num_hidden_layers": 6, "intermediate_size": 2304}
CASES = (
    Case("Llama 32 M, 8k vocabulary, one-token labels", LLAMA, 8192, (1,), 14),
    Case("Llama 32 M, 8k vocabulary, two labels of 7 to 8 tokens", LLAMA, 8192, (7, 8), 22),
    Case("Gemma 62 M (8 layers), 48k vocabulary, one-token labels", DEEP, 48000, (1,), 28),
    Case("Gemma 62 M (6 layers, wider), 48k vocabulary, one-token labels", WIDE, 48000, (1,), 28),
    Case("Gemma 62 M (8 layers), 48k vocabulary, labels of 5 to 7 tokens", DEEP, 48000,
         (5, 6, 7), 28),
)  # fmt: skip
