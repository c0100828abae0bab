"""Whether staged files are what the hub says, and whether they are what a recipe takes them for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from hpcft.config.hf_model import build_model_config
from hpcft.config.recipe_types import FullRecipe
from hpcft.core.errors import DataError
from hpcft.core.records import StagedFile
from hpcft.staging.hub_client import INDEX, HubFile
from hpcft.staging.staged_inputs import file_state

MIB = 2**20


def differs(folder: Path, name: str, expected: HubFile, known: StagedFile | None) -> str:
    """What is wrong with a fetched file by the hub's account of it; empty if nothing is.

    Args:
        folder: the snapshot.
        name: the file in it.
        expected: what the hub says.
        known: how it was when it was last checked; unchanged since, it is not hashed again.
    """
    try:
        now = file_state(folder, name)
    except OSError:
        return "is missing"
    if now.size_bytes != expected.size_bytes:
        return f"has {now.size_bytes:,} bytes, the hub's {expected.size_bytes:,}"
    if known == now.model_copy(update={"digest": expected.digest}):
        return ""
    if _digest(folder / name, expected) != expected.digest:
        return "has other content than the hub's (its hash differs)"
    return ""


def _digest(file: Path, expected: HubFile) -> str:
    """The hash that the hub gives: sha256 of a large file, git's sha1 of a small one."""
    is_git = len(expected.digest) == 40
    digest = hashlib.sha1(usedforsecurity=False) if is_git else hashlib.sha256()
    if is_git:
        digest.update(b"blob %d\0" % expected.size_bytes)
    with file.open("rb") as stream:
        while block := stream.read(16 * MIB):
            digest.update(block)
    return digest.hexdigest()


def check_weights(folder: Path) -> None:
    """Checks that every safetensors file of a model is whole and has what the index says.

    Raises:
        DataError: one is not.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, set[str]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy") as opened:
                tensors[file.name] = set(opened.keys())
        except (SafetensorError, OSError) as error:
            raise DataError(f"{file}: is not whole: {error}") from None
    index = folder / INDEX
    if not index.is_file():
        return
    for name, shard in json.loads(index.read_text())["weight_map"].items():
        if name not in tensors.get(shard, ()):
            lack = "has no" if shard in tensors else "is missing, with"
            raise DataError(f"{folder / shard}: {lack} {name}, which the index says is there")


def check_model(recipe: FullRecipe, local: FullRecipe) -> None:
    """Checks that model and tokenizer load, and are of the architecture that the recipe describes.

    Args:
        recipe: as it was written.
        local: the same with folders in the place of hub names.

    Raises:
        DataError: they do not, or are not.
    """
    from transformers import AutoConfig

    if local.model.path is not None:
        check_weights(Path(local.model.path))
        config = build_model_config(local.model, local.task)
        described = dict(recipe.model.config or {})
        if described:
            model_type = str(described.pop("model_type"))
            if config.model_type != model_type:
                raise _disagrees(recipe, "model_type", model_type, config.model_type)
            stated = AutoConfig.for_model(model_type, **described)
            for key in described:
                ours, theirs = _field(stated, key), _field(config, key)
                if ours != theirs:
                    raise _disagrees(recipe, key, ours, theirs)
    source = local.model.tokenizer or local.model.path
    if isinstance(source, str):
        load_tokenizer(source)


def _field(config: Any, key: str) -> Any:
    """A field of a configuration, wherever it keeps it."""
    parts = (config, config.get_text_config())
    found = [getattr(part, key) for part in parts if hasattr(part, key)]
    rotary = getattr(parts[1], "rope_parameters", None) or {}
    return found[0] if found else rotary.get(key)


def _disagrees(recipe: FullRecipe, key: str, ours: Any, theirs: Any) -> DataError:
    return DataError(
        f"model.config.{key}: the recipe says {ours!r}, {recipe.model.path} has {theirs!r}; "
        "correct model.config or model.path"
    )


def load_tokenizer(source: str) -> Any:
    """The tokenizer in a folder.

    Raises:
        DataError: there is none that can be used.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, use_fast=True, trust_remote_code=False)
    except Exception as error:  # a stranger's files meet many classes: anything is raised
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"model: {source} has no usable tokenizer: {first}") from None
