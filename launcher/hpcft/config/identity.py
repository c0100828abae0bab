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
from hpcft.core.units import MIB

LARGE_FILE_BYTES = 64 * MIB  # larger model files are hashed in part


def compute_fingerprints(recipe: FullRecipe) -> dict[str, str]:
    """Returns content hashes of the local files that a recipe reads, by dotted field.

    Data are hashed whole, a folder with all that lies below it. Of model files over 64 MiB only the
    size and the first and last MiB are hashed, which differ after training or truncation.

    Raises:
        DataError: a file cannot be read.
    """
    fingerprints = {}
    content = recipe.model_dump(mode="json")
    for loc in local_path_fields(content):
        text = value_at(content, loc)
        if isinstance(text, str) and text.startswith("/"):
            try:
                fingerprints[dotted_key(loc)] = _hash_path(Path(text), whole=loc[0] == "task")
            except OSError as error:
                raise DataError(
                    f"{dotted_key(loc)}: {error.filename} cannot be read: {error.strerror}; "
                    "correct the path or its permissions"
                ) from None
    return fingerprints


def _hash_path(path: Path, *, whole: bool) -> str:
    """Returns the SHA-256 of a file or folder.

    Args:
        path: the file or folder.
        whole: whether to read large files to the end, and folders with what is in subfolders.
    """
    inside = path.rglob("*") if whole else path.glob("*")
    files = [path] if path.is_file() else sorted(p for p in inside if p.is_file())
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)}\0{size}\0".encode() if path.is_dir() else b"")
        with file.open("rb") as stream:
            if whole or size <= LARGE_FILE_BYTES:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
            else:
                digest.update(stream.read(MIB))
                stream.seek(-MIB, os.SEEK_END)
                digest.update(stream.read())
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
