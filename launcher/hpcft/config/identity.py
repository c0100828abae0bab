"""Computes fingerprints of a recipe's local files, and the id of a run."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from hpcft.config.recipe import local_path_fields, value_at
from hpcft.config.recipe_types import FullRecipe
from hpcft.config.yaml_document import dotted_key
from hpcft.core.errors import DataError
from hpcft.core.file_digests import file_digest
from hpcft.core.units import MIB

# hpcft 0.1 hashed model files from this size on in part: size, first and last MiB.
PARTLY_HASHED_BYTES = 64 * MIB
WEIGHTS_INDEX = "*.safetensors.index.json"


def compute_fingerprints(
    recipe: FullRecipe, *, data_only: bool = False, partly: bool = False
) -> dict[str, str]:
    """Returns content hashes of the local files that a recipe reads, by dotted field.

    All of their content counts; of a data folder also what lies in subfolders.

    Args:
        recipe: the recipe.
        data_only: whether to leave out models, tokenizers and adapters.
        partly: whether to hash large model files in part, as hpcft 0.1 did.

    Raises:
        DataError: a file cannot be read, or a model reads files outside its folder.
    """
    fingerprints = {}
    content = recipe.model_dump(mode="json")
    for loc in local_path_fields(content):
        text, is_data = value_at(content, loc), loc[0] == "task"
        if isinstance(text, str) and text.startswith("/") and (is_data or not data_only):
            try:
                if not is_data:
                    _check_shards(dotted_key(loc), Path(text))
                fingerprints[dotted_key(loc)] = _hash_path(
                    Path(text), subfolders=is_data, partly=partly and not is_data
                )
            except OSError as error:
                raise DataError(
                    f"{dotted_key(loc)}: {error.filename} cannot be read: {error.strerror}; "
                    "correct the path or its permissions"
                ) from None
    return fingerprints


def _check_shards(key: str, folder: Path) -> None:
    """Checks that the index of a model's weights names files in its own folder only.

    Raises:
        DataError: it names others, whose content would not be part of the run's id.
        OSError: it cannot be read.
    """
    for index in folder.glob(WEIGHTS_INDEX):
        try:
            shards = {
                str(name)
                for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            }
        except (ValueError, LookupError, AttributeError, TypeError):
            continue  # Loading the model says what is wrong with it.
        if outside := sorted(name for name in shards if "/" in name):
            raise DataError(
                f"{key}: {index} names {outside[0]}, which does not lie beside it and would not be "
                "part of the run's identity; save the model again with save_pretrained"
            )


def _hash_path(path: Path, *, subfolders: bool, partly: bool) -> str:
    """Returns the SHA-256 of a file or folder.

    Args:
        path: the file or folder.
        subfolders: whether to read what is in subfolders, too.
        partly: whether to read only size, first and last MiB of large files.
    """
    inside = path.rglob("*") if subfolders else path.glob("*")
    files = [path] if path.is_file() else sorted(p for p in inside if p.is_file())
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)}\0{size}\0".encode() if path.is_dir() else b"")
        if partly and size > PARTLY_HASHED_BYTES:
            with file.open("rb") as stream:
                digest.update(stream.read(MIB))
                stream.seek(-MIB, os.SEEK_END)
                digest.update(stream.read())
        else:
            digest.update(file_digest(file))
    return digest.hexdigest()


def compute_run_id(
    recipe: FullRecipe, cluster_name: str, fingerprints: dict[str, str], origin: str = ""
) -> str:
    """Returns the id of a run: a hash of all that decides its result, and of the cluster.

    Description, baseline and the interval of checkpoints do not count, and a local file counts by
    content, not by name.

    Args:
        recipe: the run's recipe.
        cluster_name: name of the profile.
        fingerprints: hash, or commit of a hub input, by dotted field; it replaces the field.
        origin: id of the run that this one continues; empty for a run that starts from the recipe.
    """
    not_counted: Any = {"description": True, "baseline": True, "sweep": True,
                        "resources": {"checkpoint_min"}}  # fmt: skip
    content = recipe.model_dump(mode="json", exclude=not_counted)
    for key, value in fingerprints.items():
        *sections, last = key.split(".")
        node: Any = content
        for section in sections:
            node = node[section]
        node[last] = value
    parts = [content, cluster_name, *([origin] if origin else [])]
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
