"""Turns errors of ranks and lines of logs into failures."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from hpcft.core.paths import RunPaths
from hpcft.core.rank_errors import rank_error_file
from hpcft.core.records import RankError
from hpcft.recovery.diagnosis.classes import FailureClass
from hpcft.recovery.diagnosis.evidence import LINE_CHARS, EvidenceText, one_line
from hpcft.recovery.diagnosis.failure import Failure, from_class
from hpcft.recovery.diagnosis.oom import gpu_oom_class, line_of

# Errors that hpcft raises itself: their text is a sentence, and needs no class name before it.
_OWN_ERRORS = ("DataError", "UsageError", "InputError", "HpcftError")


def from_rank(error: RankError, paths: RunPaths | None = None) -> Failure:
    """Returns the failure of an error whose class the rank determined itself."""
    failure = replace(
        from_class(error.failure, error.message),
        rank=error.rank,
        node=one_line(error.node),
        source=str(rank_error_file(paths, error.rank)) if paths else "",
    )
    return replace(failure, next_step=one_line(error.next_step)) if error.next_step else failure


def from_exception(error: RankError, paths: RunPaths) -> Failure:
    """Returns the failure of an exception that no class has a pattern for."""
    line = one_line(next(iter(error.message.strip().splitlines()), ""))
    failure = from_class("user", line if error.kind in _OWN_ERRORS else f"{error.kind}: {line}")
    source = str(rank_error_file(paths, error.rank))
    return replace(failure, rank=error.rank, node=one_line(error.node), source=source)


def first_match(classes: Iterable[FailureClass], texts: Iterable[EvidenceText]) -> Failure | None:
    """Returns the failure of the first text that matches a class; None if no text does."""
    rows = tuple(classes)
    for text in texts:
        for row in rows:
            for pattern in row.patterns:
                if match := re.search(pattern, text.text):
                    return _of_match(row, match, text)
    return None


def _of_match(row: FailureClass, match: re.Match[str], text: EvidenceText) -> Failure:
    line = line_of(text.text, match.start(), LINE_CHARS)
    # Three classes share one message of PyTorch; the sizes in it tell which one it is.
    name = gpu_oom_class(line) or row.name if row.name == "gpu_oom" else row.name
    groups = match.groupdict()
    rank = text.rank if groups.get("rank") is None else int(groups["rank"])
    # Slurm writes about all ranks into the log of rank 0: that log's node says nothing then.
    from_slurm = re.match(r"(srun|slurmstepd(-\S+)?): ", line) is not None
    node = groups.get("node") or ("" if from_slurm else text.node)
    if from_slurm and groups.get("rank") is None:
        rank = None
    return replace(from_class(name, line), rank=rank, node=one_line(node), source=text.source)


def add_disk_hint(failure: Failure, paths: RunPaths) -> Failure:
    """Adds to a full file system's failure whether it is out of inodes instead of bytes."""
    match = re.search(r"'(/[^']+)'\s*$", failure.evidence)
    folders = [Path(match[1]).parent] if match else []
    for folder in (*folders, paths.folder):
        try:
            stat = os.statvfs(folder)
        except OSError:
            continue
        if stat.f_files and not stat.f_favail and stat.f_bavail:
            step = f"{folder} has no inodes left: remove some files; {failure.next_step}"
            return replace(failure, next_step=step)
    return failure
