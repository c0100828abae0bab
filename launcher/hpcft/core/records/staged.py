"""Staged: a model, tokenizer or data set of the hub that was fetched and checked."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hpcft.core.records.base import StoredPart, StoredRecord

Kind = Literal["model", "tokenizer", "dataset"]


class StagedFile(StoredPart):
    """A file at the time of its check."""

    size_bytes: int
    """Size of the file in bytes."""
    mtime_ns: int
    """Time of the file's last change, in nanoseconds; an unchanged file is not hashed again."""
    digest: str = ""
    """Hash of the file on the hub: SHA-256 of a large file, Git's SHA-1 of a small one."""


class Staged(StoredRecord):
    """A model, tokenizer or data set of the hub at one commit, in the shared cache."""

    kind: Kind
    """Kind of the input; `tokenizer` is only that part of a model's repository."""
    name: str
    """Name of the repository on the hub."""
    config_name: str | None = None
    """Configuration of a data set; None for the default one."""
    revision: str
    """Branch, tag or commit that the recipe asks for."""
    commit: str
    """Commit that `revision` stood for when it was fetched."""
    folder: str
    """Folder that jobs read: a snapshot in the cache, or a data set that `datasets` prepared."""
    files: dict[str, StagedFile]
    """Files in `folder` that jobs need, by relative path."""
    splits: dict[str, int] = Field(default_factory=dict)
    """Number of rows of each split of a data set."""
    fingerprint: str
    """Hash of the names, sizes and hashes of all fetched files on the hub."""
    staged_at: float
    """Unix time of the last check, in seconds."""

    @property
    def size_bytes(self) -> int:
        """Size in bytes of the files that jobs read."""
        return sum(file.size_bytes for file in self.files.values())


class StagedInputs(StoredRecord):
    """The staged inputs that a run reads instead of the hub."""

    inputs: dict[str, Staged] = Field(default_factory=dict)
    """Staged input, by the dotted field of the recipe that names it."""
