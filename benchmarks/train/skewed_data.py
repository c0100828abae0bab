"""Writes the model and the data that all contenders train with.

The lengths are skewed as those of real instructions are: log-normal, most of them short, a few as
long as a row may be.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

MAX_LENGTH = 512
"""Tokens of the longest example."""
MEDIAN, SPREAD = 64, 1.0
"""Parameters of the log-normal lengths: median in tokens, and sigma."""
WORDS = 8000
"""Number of words in the language; each is a token."""
GLOBAL_BATCH, MICRO_BATCH = 16, 8
"""Number of examples in an optimizer step, and in a forward pass."""
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def write(folder: Path, examples: int) -> None:
    """Writes `model/` and `train.jsonl`, and the index of data sets that LLaMA-Factory reads."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    words = [*SPECIAL, *(f"w{number}" for number in range(WORDS))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>",
    )  # fmt: skip
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=384, intermediate_size=1024, num_hidden_layers=8,
        num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=1024,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rng = random.Random(0)
    rows = []
    for _ in range(examples):
        length = round(rng.lognormvariate(0, SPREAD) * MEDIAN)
        length = min(max(length, 8), MAX_LENGTH) - 1  # The end of text is added later.
        text = [f"w{rng.randrange(WORDS)}" for _ in range(length)]
        half = length // 2
        rows.append({"prompt": " ".join(text[:half]), "completion": " " + " ".join(text[half:])})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "test.jsonl").write_text(json.dumps(rows[0]) + "\n")
    columns = {"prompt": "prompt", "response": "completion"}
    index = {"skewed": {"file_name": "train.jsonl", "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(index))
