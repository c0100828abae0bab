"""From what ranks, libraries and Slurm said to a failure."""

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

# Kinds of errors whose text says it all.
_PLAIN = ("DataError", "UsageError", "InputError", "HpcftError")


def from_rank(error: RankError, paths: RunPaths | None = None) -> Failure:
    """What a rank judged itself."""
    made = replace(
        from_class(error.failure, error.message),
        rank=error.rank,
        node=one_line(error.node),
        source=str(rank_error_file(paths, error.rank)) if paths else "",
    )
    return replace(made, next_step=one_line(error.next_step)) if error.next_step else made


def from_exception(error: RankError, paths: RunPaths) -> Failure:
    """An error of the program, or of what it was given."""
    line = one_line((error.message.strip().splitlines() or [""])[0])
    made = from_class("user", line if error.kind in _PLAIN else f"{error.kind}: {line}")
    source = str(rank_error_file(paths, error.rank))
    return replace(made, rank=error.rank, node=one_line(error.node), source=source)


def first_match(classes: Iterable[FailureClass], texts: Iterable[EvidenceText]) -> Failure | None:
    """The class of the first text that is evidence of any."""
    known = tuple(classes)
    for text in texts:
        for row in known:
            for pattern in row.patterns:
                if match := re.search(pattern, text.text):
                    return _of_match(row, match, text)
    return None


def _of_match(row: FailureClass, match: re.Match[str], text: EvidenceText) -> Failure:
    line = line_of(text.text, match.start(), LINE_CHARS)
    # Three classes share one message, and its figures tell them apart.
    name = gpu_oom_class(line) or row.name if row.name == "gpu_oom" else row.name
    made = from_class(name, line)
    named = match.groupdict()
    rank = text.rank if named.get("rank") is None else int(named["rank"])
    # Slurm's words on all ranks stand in the first one's log: its node is not meant.
    of_slurm = re.match(r"(srun|slurmstepd(-\S+)?): ", line) is not None
    node = named.get("node") or ("" if of_slurm else text.node)
    if of_slurm and named.get("rank") is None:
        rank = None
    return replace(made, rank=rank, node=one_line(node), source=text.source)


def add_disk_hint(failure: Failure, paths: RunPaths) -> Failure:
    """Of a full file system: whether it is out of bytes or out of files."""
    named = re.search(r"'(/[^']+)'\s*$", failure.evidence)
    places = [Path(named[1]).parent] if named else []
    for place in (*places, paths.folder):
        try:
            seen = os.statvfs(place)
        except OSError:
            continue
        if seen.f_files and not seen.f_favail and seen.f_bavail:
            step = f"{place}: no more files can be made (inodes): remove some; {failure.next_step}"
            return replace(failure, next_step=step)
    return failure
