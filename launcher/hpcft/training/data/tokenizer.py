"""Loads the tokenizer of a run, or trains one on the training texts for new weights."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerFast

from hpcft.config.hf_model import build_model_config
from hpcft.config.recipe_types import FullRecipe
from hpcft.core.records import TokenizerTraining
from hpcft.staging.verify import load_tokenizer
from hpcft.tasks.base import Example

PAD, START, END, MASK = "<pad>", "<s>", "</s>", "<mask>"


def make_tokenizer(recipe: FullRecipe, train: list[Example]) -> Any:
    """Trains the tokenizer on the training split, or loads the one that the recipe names."""
    spec = recipe.model.tokenizer
    if isinstance(spec, TokenizerTraining):
        texts = [text for example in train for text in recipe.task.tokenizer_texts(example)]
        config = build_model_config(recipe.model, recipe.task)
        tokenizer = train_tokenizer(
            spec,
            texts,
            causal=recipe.task.causal,
            has_mask=recipe.task.needs_mask_token,
            has_segments=getattr(config, "type_vocab_size", 1) > 1,
        )
        tokenizer.model_max_length = recipe.task.max_length
    else:
        source = spec or recipe.model.path
        assert source is not None  # The recipe's checks require one of them.
        tokenizer = load_tokenizer(source)
    if tokenizer.pad_token_id is None:
        # This is harmless: padding is masked by position, and labels of end tokens are kept.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def train_tokenizer(
    spec: TokenizerTraining,
    texts: list[str],
    *,
    causal: bool,
    has_mask: bool = False,
    has_segments: bool = False,
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer: it knows all text, and is the same for the same texts.

    (The WordPiece trainer of `tokenizers` gives another vocabulary each time it runs.) For an
    encoder, a text stands between a start and an end token, and its first word is encoded as if a
    blank stood before it. For a causal model, a text follows the start token, with its blanks as
    they are.

    Args:
        spec: size of the vocabulary, and whether to lower the case.
        texts: the training texts.
        causal: whether the tokenizer is for a causal model.
        has_mask: whether it has a mask token.
        has_segments: whether its model takes `token_type_ids`, which tell the two texts of a pair
            apart.
    """
    # Imported here, because a run with the tokenizer of its model does without them.
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Lowercase() if spec.lowercase else None
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=not causal)
    core.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=spec.vocab_size,
        special_tokens=[PAD, START, END, *([MASK] if has_mask else [])],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{START} $A" if causal else f"{START} $A {END}",
        pair=f"{START} $A $B" if causal else f"{START} $A {END} $B:1 {END}:1",
        special_tokens=[(token, core.token_to_id(token)) for token in (START, END)],
    )
    more_tokens = {} if causal else {"cls_token": START, "sep_token": END}
    if has_mask:
        more_tokens["mask_token"] = MASK
    inputs = ["input_ids", *(["token_type_ids"] if has_segments else []), "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        model_input_names=inputs,
        **more_tokens,
    )
