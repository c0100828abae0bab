"""What tells why a run ended: the errors of its ranks, and the ends of their logs.

All of it is untrusted text, which a library, a data set or another user of a node has had a part
in: only its end is read, and only so much of each line.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpcft.core.files import open_file
from hpcft.core.log_markers import SETUP_BEGINS, SETUP_ENDS, STARTS_AGAIN
from hpcft.core.paths import RunPaths
from hpcft.core.rank_errors import rank_error_file
from hpcft.core.records import RankError

TAIL_BYTES = 40_000
LINE_CHARS = 2_000
# Of so many ranks the logs are read; Slurm's own words stand in that of the first.
LOGS = 64
# What a sentence holds of a line.
EVIDENCE_CHARS = 300


@dataclass(frozen=True)
class EvidenceText:
    """Something that was said about the end of a run."""

    text: str
    """What was said."""
    source: str
    """File that it stands in."""
    rank: int | None = None
    """Global rank that said it, or in whose log it stands."""
    node: str = ""
    """Node of that rank, where it is known."""
    setup_failed: bool = False
    """Whether the batch script ended within the profile's setup: then the text is of that."""


def as_text(error: RankError, paths: RunPaths | None = None) -> EvidenceText:
    """What a rank wrote, as text."""
    source = str(rank_error_file(paths, error.rank)) if paths else ""
    return EvidenceText(_bounded(f"{error.kind}: {error.message}"), source, error.rank, error.node)


def log_ends(logs: Path, job_id: str, nodes: dict[int, str]) -> Iterator[EvidenceText]:
    """The ends of the ranks' error logs, without what an earlier start of the job has left there.

    Args:
        logs: submitit's folder.
        job_id: of the attempt.
        nodes: where ranks ran, as far as it is known.
    """
    found = {
        int(match[1]): file
        for file in logs.glob(f"{job_id}_*_log.err")
        if (match := re.fullmatch(rf"{job_id}_(\d{{1,6}})_log\.err", file.name))
    }
    for rank, file in sorted(found.items())[:LOGS]:
        with contextlib.suppress(OSError), open_file(file) as stream:  # no evidence, then
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - TAIL_BYTES))
            text = stream.read(TAIL_BYTES).decode(errors="replace")
            text = text.rpartition(STARTS_AGAIN)[2]
            _, begun, setup = text.rpartition(SETUP_BEGINS)
            failed = bool(begun) and SETUP_ENDS not in setup
            text = setup.rpartition(SETUP_ENDS)[2]
            yield EvidenceText(_bounded(text), str(file), rank, nodes.get(rank, ""), failed)


def _bounded(text: str) -> str:
    return "\n".join(line[:LINE_CHARS] for line in text[-TAIL_BYTES:].splitlines())


def one_line(text: str) -> str:
    """Text as it may stand in a cell of a table: a short line, a mark for what is not printable."""
    words = " ".join(text[: 10 * EVIDENCE_CHARS].split())
    return "".join(c if c.isprintable() else "�" for c in words)[:EVIDENCE_CHARS]
