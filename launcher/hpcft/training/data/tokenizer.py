"""Trains a tokenizer on the training texts, for a model with new weights."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from hpcft.core.records import TokenizerTraining

PAD, START, END, MASK = "<pad>", "<s>", "</s>", "<mask>"


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
