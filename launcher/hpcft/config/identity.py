"""What makes two runs the same: hashes of what they read, and an id from all that counts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from hpcft.config.recipe import local_path_fields, value_at
from hpcft.config.recipe_types import FullRecipe
from hpcft.config.yaml_document import dotted_key
from hpcft.core.errors import DataError


def compute_fingerprints(recipe: FullRecipe) -> dict[str, str]:
    """Content hashes of the local files that the recipe reads: dotted field to hash.

    Data files and small files are hashed whole, of a folder of data all that lies below it. Of
    files over 64 MiB (weights) the size and the first and last MiB are, which a retrained or
    truncated file changes.
    """
    found = {}
    content = recipe.model_dump(mode="json")
    for loc in local_path_fields(content):
        text = value_at(content, loc)
        if isinstance(text, str) and text.startswith("/"):
            try:
                found[dotted_key(loc)] = _hash_path(Path(text), whole=loc[0] == "task")
            except OSError as error:
                raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from None
    return found


def _hash_path(path: Path, *, whole: bool) -> str:
    inside = path.rglob("*") if whole else path.glob("*")
    files = [path] if path.is_file() else sorted(p for p in inside if p.is_file())
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)}\0{size}\0".encode() if path.is_dir() else b"")
        with file.open("rb") as stream:
            if whole or size <= 64 * 2**20:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
            else:
                digest.update(stream.read(2**20))
                stream.seek(-(2**20), 2)
                digest.update(stream.read())
    return digest.hexdigest()


def compute_run_id(
    recipe: FullRecipe, cluster_name: str, prints: dict[str, str], origin: str = ""
) -> str:
    """The run's identity: a hash of all that decides its result, and of where it runs.

    Descriptions, baselines and how often it is saved do not count, and a local file counts by
    content, not by name. What went on from another run, its `origin`, is not what began by itself.
    """
    aside: Any = {"description": True, "baseline": True, "sweep": True,
                  "resources": {"checkpoint_min"}}  # fmt: skip
    content = recipe.model_dump(mode="json", exclude=aside)
    for key, value in prints.items():
        *sections, last = key.split(".")
        node: Any = content
        for section in sections:
            node = node[section]
        node[last] = value
    what = [content, cluster_name, *([origin] if origin else [])]
    text = json.dumps(what, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
