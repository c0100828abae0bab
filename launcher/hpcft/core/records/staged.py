"""Staged: a model, tokenizer or data set of the hub that lies checked in the shared cache."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hpcft.core.records.base import StoredPart, StoredRecord

Kind = Literal["model", "tokenizer", "dataset"]


class StagedFile(StoredPart):
    """A file as it was when it was checked."""

    size_bytes: int
    """Its size."""
    mtime_ns: int
    """When it was last changed, so that an unchanged one is not hashed again."""
    digest: str = ""
    """Its hash by the hub: sha256 of a large file, git's sha1 of a small one."""


class Staged(StoredRecord):
    """What was fetched, at which commit, and where jobs read it."""

    kind: Kind
    """What it is; of a model's repository `tokenizer` is only that part."""
    name: str
    """Name on the hub."""
    config_name: str | None = None
    """Configuration of a data set."""
    revision: str
    """Branch, tag or commit that was asked for."""
    commit: str
    """Commit that it stood for."""
    folder: str
    """Folder that jobs read: a snapshot of the cache, or a data set as `datasets` prepared it."""
    files: dict[str, StagedFile]
    """Files of that folder that are needed."""
    splits: dict[str, int] = Field(default_factory=dict)
    """Rows of each split of a data set."""
    fingerprint: str
    """Hash of names, sizes and hashes of all files on the hub that were fetched."""
    staged_at: float
    """Unix time in seconds."""

    @property
    def size_bytes(self) -> int:
        """Size of the files that jobs read."""
        return sum(file.size_bytes for file in self.files.values())


class StagedInputs(StoredRecord):
    """What a run reads instead of asking the hub."""

    inputs: dict[str, Staged] = Field(default_factory=dict)
    """Dotted field of the recipe to what stands for its hub name."""
