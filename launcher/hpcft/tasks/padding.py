"""Pads the rows of a batch so that what a row gives does not depend on the rows beside it.

Many tokenizers of decoders pad on the left, for generation. Labels, offsets and the first token
count from the start of the text, though, and absolute positions from the start of the row: with
padding on the left, both move with the longest row of the batch. So rows are padded on the right,
whatever the tokenizer's `padding_side`, except for models that read their answer off the last
position of the row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from hpcft.tasks.base import IGNORE_INDEX, ModelInputs, TaskBase

# `SequenceSummary` of XLNet takes the last position, padding or not. Its positions are relative, so
# that padding in front changes nothing.
SUMMARISED_AT_THE_END = frozenset({"xlnet"})
# These mix padding into the text, by convolutions, a Fourier transform or pooling. Their rows are
# padded to `max_length`, so that all of them get the same.
MIX_PADDING = frozenset({"canine", "convbert", "fnet", "funnel", "nystromformer"})


def make_collator(
    task: TaskBase, tokenizer: Any, model_type: str
) -> Callable[[Sequence[ModelInputs]], Any]:
    """Returns the function that pads the rows of a batch.

    Args:
        task: the task.
        tokenizer: the model's tokenizer, which stays as it is: the saved one serves generation.
        model_type: the model's `transformers` type.
    """
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

    is_summarised = task.head().auto_class == "AutoModelForSequenceClassification"
    padder = copy.copy(tokenizer)
    at_the_end = is_summarised and model_type in SUMMARISED_AT_THE_END
    padder.padding_side = "left" if at_the_end else "right"
    options: dict[str, Any] = {}
    if model_type in MIX_PADDING:
        options = {"padding": "max_length", "max_length": task.max_length}
    collator: Callable[[Sequence[ModelInputs]], Any] = (
        DataCollatorForSeq2Seq(padder, label_pad_token_id=IGNORE_INDEX, **options)
        if task.labels_per_token
        else DataCollatorWithPadding(padder, **options)
    )
    return collator
