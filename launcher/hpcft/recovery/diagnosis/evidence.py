"""Reads the evidence of why a run ended: the errors of its ranks, and the ends of their logs.

All of it is untrusted text, to which libraries, data sets and other users of a node contribute: it
is read only from the end of a file, and only a limited part of each line.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpcft.core.files import open_file
from hpcft.core.log_markers import RESTART_LINE, SETUP_BEGIN_LINE, SETUP_END_LINE
from hpcft.core.paths import RunPaths
from hpcft.core.rank_errors import rank_error_file
from hpcft.core.records import RankError

TAIL_BYTES = 40_000
LINE_CHARS = 2_000
# Only the logs of the first ranks are read. Slurm writes its own messages into the log of rank 0.
MAX_LOGS = 64
# Longest part of a line that a sentence shows.
EVIDENCE_CHARS = 300


@dataclass(frozen=True)
class EvidenceText:
    """A text about the end of a run."""

    text: str
    """The text."""
    source: str
    """File that holds the text."""
    rank: int | None = None
    """Global rank that wrote the text, or in whose log it stands."""
    node: str = ""
    """Node of that rank; empty if it is not known."""
    setup_failed: bool = False
    """Whether the batch script ended within the profile's setup, which wrote this text."""


def as_text(error: RankError, paths: RunPaths | None = None) -> EvidenceText:
    """Returns a rank's error as evidence."""
    source = str(rank_error_file(paths, error.rank)) if paths else ""
    return EvidenceText(_bounded(f"{error.kind}: {error.message}"), source, error.rank, error.node)


def log_ends(logs: Path, job_id: str, nodes: dict[int, str]) -> Iterator[EvidenceText]:
    """Reads the ends of the ranks' error logs, from the last restart on.

    Args:
        logs: folder of submitit's logs.
        job_id: job of the attempt.
        nodes: node of each rank, for the ranks whose node is known.
    """
    files = {
        int(match[1]): file
        for file in logs.glob(f"{job_id}_*_log.err")
        if (match := re.fullmatch(rf"{job_id}_(\d{{1,6}})_log\.err", file.name))
    }
    for rank, file in sorted(files.items())[:MAX_LOGS]:
        # A log that cannot be read is no evidence.
        with contextlib.suppress(OSError), open_file(file) as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - TAIL_BYTES))
            text = stream.read(TAIL_BYTES).decode(errors="replace")
            text = text.rpartition(RESTART_LINE)[2]
            _, begun, setup = text.rpartition(SETUP_BEGIN_LINE)
            failed = bool(begun) and SETUP_END_LINE not in setup
            text = setup.rpartition(SETUP_END_LINE)[2]
            yield EvidenceText(_bounded(text), str(file), rank, nodes.get(rank, ""), failed)


def _bounded(text: str) -> str:
    return "\n".join(line[:LINE_CHARS] for line in text[-TAIL_BYTES:].splitlines())


def one_line(text: str) -> str:
    """Returns text as a short line for a table; replaces what is not printable by a mark."""
    words = " ".join(text[: 10 * EVIDENCE_CHARS].split())
    return "".join(c if c.isprintable() else "�" for c in words)[:EVIDENCE_CHARS]
