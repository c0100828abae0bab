"""The only printer: data to stdout, talk to stderr; a table on a terminal, TSV in a pipe."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hpcft.report import as_tsv

out = Console(highlight=False, soft_wrap=True)
talk = Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """A line for the person, on stderr."""
    talk.print(escape(text))


def error(text: str) -> None:
    """An error, on stderr."""
    talk.print(f"[bold red]error:[/] {escape(text)}")


def warn(text: str) -> None:
    """A warning, on stderr."""
    talk.print(f"[yellow]warning:[/] {escape(text)}")


def data(text: str) -> None:
    """Text as it is, on stdout."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def as_json(value: Any) -> None:
    """A value as JSON, on stdout."""
    data(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def table(header: list[str], cells: list[list[str]], *, right: set[str] | None = None) -> None:
    """A table on a terminal, tab-separated lines in a pipe."""
    if out.is_terminal:
        out.print(rich_table(header, cells, right=right), soft_wrap=False)
    else:
        data(as_tsv(header, cells))


def rich_table(
    header: list[str], cells: list[list[str]], *, right: set[str] | None = None
) -> Table:
    """The table to draw; columns that are empty throughout are left out."""
    used = [i for i in range(len(header)) if i == 0 or any(line[i] for line in cells)]
    drawn = Table(box=None, header_style="bold", pad_edge=False)
    for i in used:
        drawn.add_column(
            header[i],
            justify="right" if header[i] in (right or set()) else "left",
            overflow="fold",
        )
    for line in cells:
        drawn.add_row(*(escape(line[i]) for i in used))
    return drawn


def raw(block: bytes) -> None:
    """Bytes of a log on stdout, with terminal control sequences taken out."""
    text = block.decode(errors="replace")
    clean = "".join(c if c in "\n\t" or c.isprintable() else "�" for c in text)
    sys.stdout.write(clean)
    sys.stdout.flush()
