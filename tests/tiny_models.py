"""Tiny random models of real architectures: saved as a folder, or of each kind, with prompts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpcft.tasks.few_shot.requests import PromptRequest


def llama_folder(folder: Path, *, layers: int = 2) -> Path:
    """A small Llama with a byte-level tokenizer, as `save_pretrained` writes them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        set_seed,
    )

    alphabet = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocab = {token: index for index, token in enumerate(alphabet)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def bert_folder(folder: Path, *, layers: int = 1, head: bool = True) -> Path:
    """A BERT with its tokenizer, with a head that tells bad films from good ones or without."""
    from transformers import BertConfig, BertForSequenceClassification, set_seed

    from conftest import film_rows
    from hpcft.core.records import TokenizerTraining
    from hpcft.training.data.tokenizer import train_tokenizer

    texts = [row["text"] for row in film_rows(24)]
    tokenizer = train_tokenizer(
        TokenizerTraining(vocab_size=300), texts, causal=False, segments=True
    )
    tokenizer.save_pretrained(folder)
    set_seed(0)
    config = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id,
        id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1},
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    (model if head else model.bert).save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- of each kind


VOCABULARY = 259
SHARED = 51
WINDOW = 12  # smaller than the prefix, and than most rows
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma": {"head_dim": 16},
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "gemma2": {"head_dim": 16, "sliding_window": WINDOW},
    "gemma3_text": {"head_dim": 16, "sliding_window": WINDOW,
                    "layer_types": ["sliding_attention", "full_attention"] * 2},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "phi3": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {},
    "gpt_oss": {"head_dim": 16, "sliding_window": WINDOW, "num_local_experts": 4,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "mamba": {},
}  # fmt: skip


def tiny(kind: str, **changes: Any) -> Any:
    """A random model of this architecture, its weights large enough to have opinions."""
    import transformers

    transformers.set_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **MORE[kind], **changes})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def asked(choices: tuple[int, ...] = (1, 2, 5), count: int = 7) -> list[PromptRequest]:
    """Prompts that share their beginning, of unlike lengths, with choices of so many tokens."""
    from hpcft.tasks.few_shot.requests import PromptRequest

    dice = random.Random(0)

    def tokens(number: int) -> list[int]:
        return [dice.randrange(3, VOCABULARY) for _ in range(number)]

    shots = [1, *tokens(SHARED - 1)]
    return [
        PromptRequest([*shots, 3 + i, *tokens(4 + 5 * (i % 4))], [tokens(n) for n in choices])
        for i in range(count)
    ]
