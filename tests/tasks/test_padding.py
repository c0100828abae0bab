"""Checks that what a row gives does not depend on the batch it stands in.

Every task runs through small models of several architectures, with tokenizers of three families
that pad on either side: a row alone against the same row beside longer ones.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import set_seed

from builders import FAMILIES, family_tokenizer
from hpcft.config.hf_model import auto_model_class, build_model_config
from hpcft.config.recipe_types import FullRecipe
from hpcft.tasks.padding import make_collator
from hpcft.training.trainer.features import _first_token

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "bert": SIZES,
    "roberta": SIZES,
    "deberta-v2": {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "llama": SIZES,
    "gpt2": {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128,
             "initializer_range": 0.3},
    "opt": {"vocab_size": 320, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 128, "word_embed_proj_dim": 32,
            "init_std": 0.3},
    "convbert": {**SIZES, "embedding_size": 32},
    "fnet": {key: value for key, value in SIZES.items() if key != "num_attention_heads"},
    "funnel": {"vocab_size": 320, "d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 48,
               "block_sizes": [1, 1], "num_decoder_layers": 1, "initializer_range": 0.3,
               "hidden_dropout": 0.0},
    "xlnet": {"vocab_size": 320, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48,
              "initializer_range": 0.3},
}  # fmt: skip
DATA = {"files": {"train": "train.jsonl", "test": "test.jsonl"}}
TASKS: dict[str, dict[str, Any]] = {
    "classification": {"labels": ["bad", "good"], "max_length": 64},
    "question_answering": {"max_length": 64, "doc_stride": 8, "max_query_length": 16,
                           "version_2_with_negative": True},
    "instruction": {"prompt": "{q}", "completion": "{a}", "max_length": 64},
    "choices": {"name": "instruction", "prompt": "{q}", "completion": "{a}", "max_length": 64,
                "choices": [" good", " four legs"]},
    "pretraining": {"max_length": 64},
}  # fmt: skip
TEXTS = ["four legs", "how many legs has a horse", "which one is it ? " * 5]


def examples_of(name: str) -> list[dict[str, Any]]:
    """Three examples of a task, each longer than the one before."""
    if name == "classification":
        return [{"text": text, "text_pair": None, "label": i % 2} for i, text in enumerate(TEXTS)]
    if name == "question_answering":
        return [{"question": "which one ?", "context": text + " a horse it is",
                 "answers": [(len(text) + 3, "horse")]} for text in TEXTS]  # fmt: skip
    if name == "pretraining":
        return [{"first": text, "second": text[::-1], "label": i % 2}
                for i, text in enumerate(TEXTS)]  # fmt: skip
    return [{"prompt": text, "completion": " good"} for text in TEXTS]


CASES = [
    ("classification", "bert", "full"),
    ("classification", "roberta", "full"),
    ("classification", "deberta-v2", "lora"),
    ("classification", "gpt2", "full"),
    ("classification", "opt", "full"),
    ("classification", "llama", "lora"),
    ("classification", "xlnet", "full"),
    ("classification", "convbert", "full"),
    ("classification", "fnet", "full"),
    ("classification", "funnel", "full"),
    ("classification", "bert", "p_tuning"),
    ("classification", "roberta", "p_tuning"),
    ("classification", "gpt2", "p_tuning"),
    ("classification", "llama", "prompt_tuning"),
    ("classification", "bert", "features"),
    ("question_answering", "bert", "full"),
    ("question_answering", "gpt2", "full"),
    ("question_answering", "llama", "full"),
    ("question_answering", "xlnet", "full"),
    ("question_answering", "bert", "p_tuning"),
    ("instruction", "gpt2", "full"),
    ("instruction", "llama", "full"),
    ("instruction", "opt", "lora"),
    ("instruction", "gpt2", "p_tuning"),
    ("choices", "gpt2", "full"),
    ("pretraining", "bert", "full"),
]


def recipe_of(name: str, model: str, method: str) -> FullRecipe:
    options = {"features": {}, "lora": {"r": 2, "target_modules": "all-linear"}}
    return FullRecipe.model_validate(
        {"name": "made", "model": {"config": {"model_type": model, **MODELS[model]},
                                   "tokenizer": {"vocab_size": 320}},
         "task": {"name": name, "data": DATA, **TASKS[name]},
         "method": {"name": method, **options.get(method, {}),
                    **({"num_virtual_tokens": 3} if "tuning" in method else {})}}
    )  # fmt: skip


def model_of(recipe: FullRecipe, pad: int) -> Any:
    set_seed(1)
    config = build_model_config(recipe.model, recipe.task)
    config.pad_token_id = pad
    model = auto_model_class(recipe.task).from_config(config)
    return recipe.method.wrap(model, causal=recipe.task.causal, checkpointing=False).eval()


@pytest.mark.parametrize(("name", "model_type", "method"), CASES)
def test_answer_to_a_row_does_not_depend_on_its_batch(
    name: str, model_type: str, method: str
) -> None:
    recipe = recipe_of(name, model_type, method)
    task = recipe.task.as_trained
    model = model_of(recipe, 0)
    for family in FAMILIES:
        by_side = []
        for side in ("left", "right"):
            tokenizer = family_tokenizer(family, adds_start=True, adds_end=not task.causal,
                                         side=side)  # fmt: skip
            pad = make_collator(task, tokenizer, model_type)
            rows = [
                {key: value for key, value in row.items() if key != "offsets"}
                for example in examples_of(name)
                for row in task.scoring_features(example, tokenizer)
            ]
            assert len({len(row["input_ids"]) for row in rows}) > 2

            def answers(batch: list[dict[str, Any]], pad: Any = pad) -> list[Any]:
                inputs = pad([dict(row) for row in batch])
                labels = inputs.pop("labels")
                with torch.no_grad():
                    outputs = model(**inputs)
                if method == "features":
                    return list(_first_token((outputs["last_hidden_state"],), labels))
                logits = task.hide_padding(task.logits(outputs), inputs["attention_mask"])
                return list(task.reduce_logits(logits, labels))

            alone = [answers([row])[0] for row in rows]
            together = answers(rows)
            for one, beside in zip(alone, together, strict=True):
                assert one.isfinite().sum() >= 2
                assert torch.allclose(one, beside, rtol=1e-3, atol=2e-4), (family, side)
            assert tokenizer.padding_side == side, "the tokenizer is saved as it was"
            by_side.append(torch.stack(together))
        assert torch.allclose(*by_side), "the side in the tokenizer's file does not count"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_labels_of_a_padded_batch_stand_at_the_answer(family: str, side: str) -> None:
    task = recipe_of("question_answering", "llama", "full").task.as_trained
    tokenizer = family_tokenizer(family, adds_start=True, side=side)
    pad = make_collator(task, tokenizer, "llama")
    rows = [row for example in examples_of("question_answering")
            for row in task.training_features(example, tokenizer)]  # fmt: skip
    batch = pad(rows)
    assert (batch["attention_mask"].sum(1) < batch["attention_mask"].shape[1]).any()
    found = [
        tokenizer.decode(ids[first : last + 1])
        for ids, (first, last) in zip(batch["input_ids"], batch["labels"].tolist(), strict=True)
        if last
    ]
    assert len(found) >= 3
    assert {text.replace(" ", "") for text in found} == {"horse"}
