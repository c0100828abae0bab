"""A tokenizer trained on the training texts, for a model that starts from nothing."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from hpcft.core.records import TokenizerTraining

PAD, START, END, MASK = "<pad>", "<s>", "</s>", "<mask>"


def train_tokenizer(
    wanted: TokenizerTraining,
    texts: list[str],
    *,
    causal: bool,
    mask: bool = False,
    segments: bool = False,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: no text is unknown to it, and the same texts give the same one.

    (The WordPiece trainer of `tokenizers` gives another vocabulary each time it is run.) For an
    encoder a text stands between start and end, and each word is written as after a blank; for a
    causal model it follows the start, and its blanks are kept as they are.

    Args:
        wanted: size and case.
        texts: what it is trained on.
        causal: for a causal model.
        mask: with a mask token.
        segments: for a model that is told which text of a pair a token belongs to.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Lowercase() if wanted.lowercase else None
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=not causal)
    core.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=wanted.vocab_size,
        special_tokens=[PAD, START, END, *([MASK] if mask else [])],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{START} $A" if causal else f"{START} $A {END}",
        pair=f"{START} $A $B" if causal else f"{START} $A {END} $B:1 {END}:1",
        special_tokens=[(token, core.token_to_id(token)) for token in (START, END)],
    )
    marks = {} if causal else {"cls_token": START, "sep_token": END}
    if mask:
        marks["mask_token"] = MASK
    inputs = ["input_ids", *(["token_type_ids"] if segments else []), "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        model_input_names=inputs,
        **marks,
    )
