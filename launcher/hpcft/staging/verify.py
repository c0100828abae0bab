"""Checks downloaded files against the hub's sizes and hashes, and against the recipe."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from hpcft.config.hf_model import build_model_config
from hpcft.config.recipe_types import FullRecipe
from hpcft.core.errors import DataError, first_line
from hpcft.core.records import StagedFile
from hpcft.core.units import MIB
from hpcft.staging.hub_client import WEIGHTS_INDEX, HubFile
from hpcft.staging.staged_inputs import read_file_state


def mismatch_reason(folder: Path, name: str, expected: HubFile, checked: StagedFile | None) -> str:
    """Returns how a downloaded file differs from the hub's; empty if it does not.

    Args:
        folder: the snapshot.
        name: the file in it.
        expected: size and hash on the hub.
        checked: the file at its last check; if it has not changed since, it is not hashed again.
    """
    try:
        now = read_file_state(folder, name)
    except OSError:
        return "is missing"
    if now.size_bytes != expected.size_bytes:
        return f"has {now.size_bytes:,} bytes, but {expected.size_bytes:,} on the hub"
    if checked == now.model_copy(update={"digest": expected.digest}):
        return ""
    if _digest(folder / name, expected) != expected.digest:
        return "has other content than on the hub (its hash differs)"
    return ""


def _digest(file: Path, expected: HubFile) -> str:
    """Returns the hash of a file, of the kind that the hub has (see `HubFile`)."""
    is_git = len(expected.digest) == 40
    digest = hashlib.sha1(usedforsecurity=False) if is_git else hashlib.sha256()
    if is_git:
        digest.update(b"blob %d\0" % expected.size_bytes)
    with file.open("rb") as stream:
        while block := stream.read(16 * MIB):
            digest.update(block)
    return digest.hexdigest()


def check_weights(folder: Path) -> None:
    """Checks that the safetensors files of a model are whole and have all tensors of the index.

    Raises:
        DataError: a file is damaged, or a tensor is missing.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, set[str]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy") as opened:
                tensors[file.name] = set(opened.keys())
        except (SafetensorError, OSError) as error:
            raise DataError(f"{file}: is damaged: {error}; save or stage it again") from None
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        return
    for name, shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
        if name not in tensors.get(shard, ()):
            what = f"has no tensor {name}" if shard in tensors else "is missing"
            raise DataError(
                f"{folder / shard}: {what}, but {WEIGHTS_INDEX} lists it; save or stage it again"
            )


def check_model(recipe: FullRecipe, local: FullRecipe) -> None:
    """Checks that model and tokenizer load, and that the model is as the recipe describes it.

    Args:
        recipe: the recipe as it was written.
        local: the same recipe with folders in the place of hub names.

    Raises:
        DataError: they do not load, or the architecture is another one.
    """
    from transformers import AutoConfig

    if local.model.path is not None:
        check_weights(Path(local.model.path))
        config = build_model_config(local.model, local.task)
        described = dict(recipe.model.config or {})
        if described:
            model_type = str(described.pop("model_type"))
            if config.model_type != model_type:
                raise _mismatch_error(recipe, "model_type", model_type, config.model_type)
            stated = AutoConfig.for_model(model_type, **described)
            for key in described:
                ours, theirs = _config_field(stated, key), _config_field(config, key)
                if ours != theirs:
                    raise _mismatch_error(recipe, key, ours, theirs)
    source = local.model.tokenizer or local.model.path
    if isinstance(source, str):
        load_tokenizer(source)


def _config_field(config: Any, key: str) -> Any:
    """Returns a field of a configuration, or of its text or rotary part."""
    text_config = config.get_text_config()
    for part in (config, text_config):
        if hasattr(part, key):
            return getattr(part, key)
    return (getattr(text_config, "rope_parameters", None) or {}).get(key)


def _mismatch_error(recipe: FullRecipe, key: str, ours: Any, theirs: Any) -> DataError:
    return DataError(
        f"model.config.{key}: the recipe says {ours!r}, {recipe.model.path} has {theirs!r}; "
        "correct model.config or model.path"
    )


def load_tokenizer(source: str) -> Any:
    """Loads the tokenizer in a folder.

    Raises:
        DataError: the folder has no tokenizer that can be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, use_fast=True, trust_remote_code=False)
    except Exception as error:  # the files go into many classes, which raise anything
        raise DataError(
            f"model: {source} has no usable tokenizer: {first_line(error)}; "
            "save one there, or set model.tokenizer"
        ) from None
