"""Checks that a model has an embedding for every token that a local tokenizer may give."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from hpcft.core.errors import DataError
from hpcft.core.records import ModelSpec

_FILE = "tokenizer.json"


def check_vocabulary(model: ModelSpec, vocab_size: int) -> None:
    """Checks the largest token id of a tokenizer on this machine against the model's embeddings.

    On a GPU, a larger id would end the job with an assertion on the device.

    Args:
        model: the model, whose path or tokenizer may be a local folder.
        vocab_size: number of the model's embeddings; 0 if not known.

    Raises:
        DataError: the tokenizer gives larger ids.
    """
    named = isinstance(model.tokenizer, str)
    source = model.tokenizer if isinstance(model.tokenizer, str) else model.path
    if model.tokenizer is not None and not named:
        return  # A tokenizer that is trained for the model gets no more tokens than it has.
    file = Path(source or "") / _FILE
    if not (source and vocab_size and file.is_absolute() and file.is_file()):
        return
    largest, token = _largest_id(file, file.stat().st_mtime_ns)
    if largest >= vocab_size:
        field = "model.tokenizer" if named else "model.path"
        raise DataError(
            f"{field}: the tokenizer in {source} gives {token!r} the id {largest}, but the model "
            f"has {vocab_size} embeddings; use the model's own tokenizer, or save the model after "
            "model.resize_token_embeddings(len(tokenizer))"
        )


@functools.lru_cache(maxsize=16)
def _largest_id(file: Path, _mtime_ns: int) -> tuple[int, str]:
    """Returns the largest token id that texts may get, and its token; -1 for an unreadable file.

    Special tokens without a role are left out: no text gets them (Gemma 3's token for an image is
    beyond the embeddings of its text models).
    """
    import tokenizers

    try:
        core = tokenizers.Tokenizer.from_file(str(file))
    except Exception:  # it raises nothing more special; loading the tokenizer tells the reason
        return -1, ""
    added = core.get_added_tokens_decoder()
    roles = _tokens_with_a_role(file.parent)
    unused = {i for i, token in added.items() if token.special and token.content not in roles}
    ids = {i: token for token, i in core.get_vocab(with_added_tokens=True).items()}
    largest = max((i for i in ids if i not in unused), default=-1)
    return largest, ids.get(largest, "")


def _tokens_with_a_role(folder: Path) -> set[str]:
    """Returns the tokens for padding, begin, end and the like, which texts get by themselves."""
    tokens = set()
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        for key, value in content.items() if isinstance(content, dict) else ():
            if key.endswith("_token"):
                tokens.add(value.get("content") if isinstance(value, dict) else value)
    return {token for token in tokens if isinstance(token, str)}
