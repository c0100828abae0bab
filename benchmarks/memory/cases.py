"""Lists the cases of the memory benchmark as data.

`case.py` makes the recipe of a case. Sizes are chosen so that a case runs in seconds on two cores.
"""

from __future__ import annotations

from typing import Any

from case import Case

# ---------------------------------------------------------------- models


def decoder(
    model_type: str, hidden: int, layers: int, vocab: int = 8000, heads: int = 8, **more: Any
) -> dict[str, Any]:
    """Returns a configuration of a model like Llama; `more` adds or replaces fields."""
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": hidden * 8 // 3 // 64 * 64,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        **more,
    }


def encoder(
    model_type: str, hidden: int, layers: int, vocab: int = 12000, **more: Any
) -> dict[str, Any]:
    """Returns a configuration of a model like BERT; dropout is 0.1 unless `more` replaces it."""
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "vocab_size": vocab,
        **more,
    }


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

LLAMA = decoder("llama", 384, 12)
LLAMA_GQA = decoder("llama", 512, 10, 16000, num_key_value_heads=2)
LLAMA_120M = decoder("llama", 768, 12, 24000, 12)
LLAMA_210M = decoder("llama", 1024, 14, 16000, 16, num_key_value_heads=8)
LLAMA_SMALL = decoder("llama", 384, 8)
LLAMA_SHALLOW = decoder("llama", 256, 2, 256000, 4, tie_word_embeddings=True)
LLAMA_UNTIED = decoder("llama", 256, 2, 128000, 4)
GEMMA = decoder("gemma", 384, 8, 32000, 6, head_dim=64, num_key_value_heads=1)
GEMMA2 = decoder("gemma2", 384, 14, 16000, 6, head_dim=64, num_key_value_heads=2, sliding_window=64)
GEMMA3 = decoder(
    "gemma3_text", 512, 18, 32000, 8, head_dim=64, num_key_value_heads=2, sliding_window=128
)
GEMMA3_300M = decoder(
    "gemma3_text", 1024, 18, 64000, 8, head_dim=128, num_key_value_heads=2, sliding_window=128
)
MISTRAL = decoder("mistral", 512, 10, 12000, num_key_value_heads=2)
MISTRAL_WINDOW = decoder("mistral", 448, 9, 10000, 7, num_key_value_heads=7, sliding_window=96)
QWEN2 = decoder("qwen2", 448, 10, 20000, 7, num_key_value_heads=1)
QWEN3 = decoder("qwen3", 512, 8, 20000, head_dim=128, num_key_value_heads=2)
QWEN3_380M = decoder("qwen3", 1024, 24, 32000, 16, head_dim=64, num_key_value_heads=8)
BERT = encoder("bert", 384, 8)
BERT_BASE = encoder("bert", 768, 12, 30522)
BERT_LARGE = encoder("bert", 1024, 24, 30522)
ROBERTA = encoder("roberta", 512, 8, 20000, max_position_embeddings=514)
DISTILBERT = {
    "model_type": "distilbert",
    "dim": 512,
    "hidden_dim": 2048,
    "n_layers": 6,
    "n_heads": 8,
    "vocab_size": 20000,
}
OPT = {
    "model_type": "opt",
    "hidden_size": 512,
    "word_embed_proj_dim": 512,
    "ffn_dim": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "vocab_size": 16000,
    "max_position_embeddings": 1024,
}
NEOX = {
    "model_type": "gpt_neox",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "vocab_size": 16000,
    "max_position_embeddings": 1024,
}

# ---------------------------------------------------------------- methods

LORA: dict[str, Any] = {"name": "lora", "r": 16}
LORA_ALL: dict[str, Any] = {"name": "lora", "r": 8, "target_modules": "all-linear"}
LORA_DROPOUT: dict[str, Any] = {"name": "lora", "r": 16, "lora_dropout": 0.05}
DORA: dict[str, Any] = {"name": "lora", "r": 8, "use_dora": True}
QLORA: dict[str, Any] = {"name": "qlora", "r": 16, "target_modules": "all-linear"}
QLORA_PLAIN: dict[str, Any] = {"name": "qlora", "r": 8, "bnb_4bit_use_double_quant": False}
HEAD_ONLY: dict[str, Any] = {"name": "head_only"}
P_TUNING: dict[str, Any] = {"name": "p_tuning"}
FROZEN: dict[str, Any] = {"name": "frozen"}
FROZEN_4BIT: dict[str, Any] = {"name": "frozen", "load_in_4bit": True}

# ---------------------------------------------------------------- one process

_LABEL = "classification"


def _few_shot(
    name: str,
    model: dict[str, Any],
    words: tuple[str, ...] = ("no", "yes"),
    method: dict[str, Any] = FROZEN,
    **more: Any,
) -> Case:
    fields = {"batch": 1, "sequence": 1024, **more}
    return Case(name, model, method, "prompting", words=words, **fields)


ONE_PROCESS = [
    Case("llama-full", LLAMA),
    Case("llama-full-checkpointing", LLAMA, checkpointing=True, batch=4),
    Case("llama-full-bf16", LLAMA, precision="bf16"),
    Case("llama-full-bf16-checkpointing", LLAMA, precision="bf16", checkpointing=True, batch=3),
    Case("llama-full-eager", LLAMA, attention="eager", sequence=320),
    Case("llama-full-accumulation", LLAMA, accumulation=2, batch=1, sequence=500),
    Case("llama-full-fused", LLAMA_GQA, optim="adamw_torch_fused", batch=1, sequence=64),
    Case("llama-full-adamw-8bit", LLAMA_GQA, optim="adamw_bnb_8bit", batch=1, sequence=128),
    Case("llama-full-paged-8bit", LLAMA_GQA, optim="paged_adamw_8bit", batch=1, sequence=128),
    Case("llama-full-s1024", LLAMA, batch=1, sequence=1024),
    Case("llama-full-120m", LLAMA_120M, batch=1),
    Case("llama-full-210m-checkpointing", LLAMA_210M, batch=1, checkpointing=True),
    Case("llama-lora", LLAMA, LORA),
    Case("llama-lora-all-checkpointing", LLAMA_GQA, LORA_ALL, checkpointing=True, batch=5),
    Case("llama-lora-bf16", LLAMA_GQA, LORA, precision="bf16", sequence=384),
    Case("llama-lora-dropout", LLAMA, LORA_DROPOUT, batch=3, sequence=200),
    Case("llama-dora", LLAMA, DORA, batch=2, sequence=128),
    Case("llama-qlora", LLAMA, QLORA),
    Case("llama-qlora-bf16-checkpointing", LLAMA_120M, QLORA, precision="bf16", checkpointing=True),
    Case("llama-qlora-plain", LLAMA_GQA, QLORA_PLAIN, batch=4, sequence=96),
    Case("llama-p-tuning", LLAMA, P_TUNING),
    Case("llama-classification", LLAMA, task=_LABEL, batch=4, sequence=192),
    Case("llama-head-only", LLAMA, HEAD_ONLY, task=_LABEL, batch=8, sequence=128),
    Case("llama-shallow-huge-vocabulary", LLAMA_SHALLOW, batch=2, sequence=192),
    Case("llama-shallow-huge-vocabulary-lora", LLAMA_SHALLOW, LORA, batch=1, sequence=350),
    Case("llama-shallow-loss-in-parts", LLAMA_SHALLOW, batch=4, loss_chunks=8),
    Case("llama-shallow-loss-in-parts-lora", LLAMA_SHALLOW, LORA, batch=4, loss_chunks=8),
    Case("llama-untied-loss-in-parts-bf16", LLAMA_UNTIED, precision="bf16", loss_chunks=8),
    Case(
        "gemma2-loss-in-parts-lora-bf16",
        GEMMA2,
        LORA,
        attention="eager",
        precision="bf16",
        batch=4,
        loss_chunks=8,
    ),
    Case("gemma-full", GEMMA, batch=3, sequence=160),
    Case("gemma-lora-bf16", GEMMA, LORA, precision="bf16", batch=2, sequence=300),
    Case("gemma2-deep-full", GEMMA2, batch=2, sequence=256, attention="eager"),
    Case("gemma2-deep-lora", GEMMA2, LORA_ALL, sequence=288, checkpointing=True, attention="eager"),
    Case("gemma3-deep-full", GEMMA3, batch=2, sequence=384),
    Case("gemma3-deep-qlora-bf16", GEMMA3, QLORA, precision="bf16", batch=2, sequence=384),
    Case("gemma3-300m-lora", GEMMA3_300M, LORA, batch=1, sequence=200),
    Case("mistral-full", MISTRAL, batch=2, sequence=300),
    Case("mistral-window-lora", MISTRAL_WINDOW, LORA, batch=3, sequence=256),
    Case("qwen2-full", QWEN2, batch=2, sequence=333),
    Case("qwen2-lora-bf16-accumulation", QWEN2, LORA, precision="bf16", accumulation=2),
    Case("qwen3-full-bf16", QWEN3, precision="bf16", batch=3, sequence=192),
    Case("qwen3-380m-qlora", QWEN3_380M, QLORA, batch=1, checkpointing=True),
    Case("bert-full", BERT, task=_LABEL, batch=8, sequence=128),
    Case("bert-base-full", BERT_BASE, task=_LABEL, batch=6, sequence=96),
    Case("bert-large-full", BERT_LARGE, task=_LABEL, batch=1, sequence=128),
    Case("bert-full-no-dropout", {**BERT, **NO_DROPOUT}, task=_LABEL, batch=5, sequence=250),
    Case("bert-full-eager", BERT, task=_LABEL, batch=4, sequence=200, attention="eager"),
    Case("bert-full-bf16", BERT, task=_LABEL, batch=8, sequence=128, precision="bf16"),
    Case("bert-lora", BERT_BASE, LORA, task=_LABEL, batch=4, sequence=128),
    Case("bert-qlora", BERT_BASE, QLORA, task=_LABEL, batch=4, sequence=128),
    Case("bert-head-only", BERT_BASE, HEAD_ONLY, task=_LABEL, batch=8, sequence=256),
    Case("bert-p-tuning", BERT, P_TUNING, task=_LABEL, batch=4, sequence=128),
    Case("roberta-full", ROBERTA, task=_LABEL, batch=7, sequence=100),
    Case("roberta-full-checkpointing", ROBERTA, task=_LABEL, sequence=512, checkpointing=True),
    Case("roberta-lora-bf16", ROBERTA, LORA, task=_LABEL, batch=4, precision="bf16"),
    Case("distilbert-full", DISTILBERT, task=_LABEL, batch=8, sequence=128),
    Case("distilbert-lora-checkpointing", DISTILBERT, LORA_ALL, task=_LABEL, checkpointing=True),
    Case("opt-full", OPT, batch=2, sequence=256),
    Case("opt-lora-checkpointing", OPT, LORA, batch=4, sequence=256, checkpointing=True),
    Case("neox-full", NEOX, batch=2, sequence=256),
    Case("neox-lora", NEOX, LORA, batch=3, sequence=222),
    Case("llama-full-packed", LLAMA, packed=True, batch=4),
    Case("llama-full-checkpointing-packed", LLAMA, packed=True, checkpointing=True, batch=4),
    Case("gemma-full-packed", GEMMA, packed=True, batch=3, sequence=160),
    Case("gemma3-deep-packed", GEMMA3, packed=True, batch=2, sequence=384),
    Case("llama-lora-packed", LLAMA_GQA, LORA, packed=True, precision="bf16", sequence=384),
    Case("llama-qlora-packed", LLAMA, QLORA, packed=True, batch=3, sequence=200),
    _few_shot("llama-few-shot", LLAMA, batch=2, sequence=512),
    _few_shot("gemma-few-shot-long-answers", GEMMA, words=("nope", "yes, it is"), batch=2),
    _few_shot("llama-few-shot-4bit", LLAMA_120M, method=FROZEN_4BIT, precision="bf16"),
    _few_shot("gemma3-few-shot-window", GEMMA3),
]

# ---------------------------------------------------------------- several ranks

# The fused optimizer needs no memory of its own, so that the backward pass is the peak.
FUSED = "adamw_torch_fused"


def _sharded(name: str, model: dict[str, Any], ranks: int, stage: int, **more: Any) -> Case:
    kind = f"zero{stage}" if stage else "ddp"
    return Case(f"{name}-{kind}-{ranks}", model, stage=stage, ranks=ranks, **more)


SEVERAL_RANKS = [
    _sharded("llama-full", LLAMA_SMALL, 2, 0, batch=2, sequence=128),
    _sharded("llama-full", LLAMA_SMALL, 2, 1, batch=2, sequence=128),
    _sharded("llama-full", LLAMA_SMALL, 2, 2, batch=2, sequence=128),
    _sharded("llama-full", LLAMA_SMALL, 2, 3, batch=2, sequence=128),
    _sharded("llama-full-bf16", LLAMA_SMALL, 2, 1, batch=2, sequence=128, precision="bf16"),
    _sharded("llama-full-bf16", LLAMA_SMALL, 2, 2, batch=2, sequence=128, precision="bf16"),
    _sharded("llama-full-bf16", LLAMA_SMALL, 2, 3, batch=2, sequence=128, precision="bf16"),
    _sharded("llama-lora", LLAMA_SMALL, 2, 0, method=LORA, batch=2, sequence=128),
    _sharded("llama-lora", LLAMA_SMALL, 2, 2, method=LORA, batch=2, sequence=128),
    _sharded("llama-lora", LLAMA_SMALL, 2, 3, method=LORA, batch=2, sequence=128),
    _sharded("llama-qlora", LLAMA_SMALL, 2, 2, method=QLORA, batch=2, sequence=128),
    _sharded("llama-qlora-bf16", LLAMA_SMALL, 2, 2, method=QLORA, precision="bf16", sequence=160),
    _sharded("gqa-full-bf16", LLAMA_GQA, 2, 3, batch=1, sequence=64, precision="bf16"),
    _sharded("gqa-full-checkpointing", LLAMA_GQA, 2, 3, batch=2, sequence=96, checkpointing=True),
    _sharded("gqa-full-accumulation", LLAMA_GQA, 2, 2, batch=1, sequence=96, accumulation=2),
    _sharded("bert-full", BERT, 2, 2, task=_LABEL, batch=4, sequence=128),
    _sharded("bert-full", BERT, 2, 3, task=_LABEL, batch=4, sequence=128),
    _sharded("llama-long", LLAMA_SMALL, 2, 1, batch=5, sequence=256, optim=FUSED),
    _sharded("llama-long", LLAMA_SMALL, 2, 2, batch=4, sequence=384, optim=FUSED),
    _sharded("llama-long", LLAMA_SMALL, 2, 3, batch=4, sequence=384, optim=FUSED),
    _sharded("llama-long-bf16", LLAMA_SMALL, 2, 2, batch=4, sequence=384, precision="bf16"),
    _sharded("bert-long-bf16", BERT, 2, 3, task=_LABEL, batch=8, sequence=256, precision="bf16"),
    _sharded("llama-loss-in-parts", LLAMA_UNTIED, 2, 0, batch=2, loss_chunks=8),
    _sharded("llama-loss-in-parts", LLAMA_UNTIED, 2, 2, batch=2, loss_chunks=8, optim=FUSED),
    _sharded(
        "llama-loss-in-parts-bf16", LLAMA_UNTIED, 2, 3, precision="bf16", loss_chunks=8, optim=FUSED
    ),
    _sharded("llama-packed", LLAMA_SMALL, 2, 0, packed=True, batch=2, sequence=128),
    _sharded("llama-packed", LLAMA_SMALL, 2, 3, packed=True, batch=4, sequence=384, optim=FUSED),
    _sharded("llama-full", LLAMA_SMALL, 4, 1, batch=1, sequence=128),
    _sharded("llama-full", LLAMA_SMALL, 4, 2, batch=1, sequence=128),
    _sharded("llama-full", LLAMA_SMALL, 4, 3, batch=1, sequence=128),
    _sharded("llama-full-bf16", LLAMA_SMALL, 4, 2, batch=1, sequence=128, precision="bf16"),
    _sharded("llama-lora-bf16", LLAMA_SMALL, 4, 3, method=LORA, sequence=64, precision="bf16"),
    _sharded("bert-full-bf16", BERT, 4, 2, task=_LABEL, batch=2, sequence=128, precision="bf16"),
]

CASES = ONE_PROCESS + SEVERAL_RANKS

# ---------------------------------------------------------------- larger ones, for a GPU

_LLAMA_1B = decoder("llama", 2048, 16, 128256, 32, num_key_value_heads=8, intermediate_size=8192)
_LLAMA_8B = decoder("llama", 4096, 32, 128256, 32, num_key_value_heads=8, intermediate_size=14336)
_GEMMA2_2B = decoder(
    "gemma2", 2304, 26, 256000, 8, head_dim=256, num_key_value_heads=4, intermediate_size=9216
)
_BF16: dict[str, Any] = {"precision": "bf16"}

ON_GPU = [
    Case("gpu-bert-large-full", BERT_LARGE, task=_LABEL, batch=16, sequence=512, **_BF16),
    Case("gpu-llama-1b-full", _LLAMA_1B, batch=2, sequence=2048, **_BF16),
    Case("gpu-llama-1b-full-checkpointing", _LLAMA_1B, batch=8, checkpointing=True, **_BF16),
    Case("gpu-llama-1b-lora-fp32", _LLAMA_1B, LORA, batch=2, sequence=512),
    Case("gpu-llama-8b-lora", _LLAMA_8B, LORA, batch=1, sequence=1024, **_BF16),
    Case("gpu-llama-8b-qlora", _LLAMA_8B, QLORA, batch=4, checkpointing=True, **_BF16),
    Case("gpu-gemma2-2b-lora", _GEMMA2_2B, LORA, attention="eager", sequence=512, **_BF16),
]


def find_case(name: str) -> Case:
    """Returns the case of that name.

    Raises:
        SystemExit: no case has that name.
    """
    for case in CASES + ON_GPU:
        if case.name == name:
            return case
    raise SystemExit(f"there is no case {name!r}; benchmarks/memory/cases.py lists all cases")
