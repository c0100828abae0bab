"""Prints everything that commands print: data to stdout, messages to stderr.

A table is drawn on a terminal, and written as tab-separated lines into a pipe. rich is imported
only where something is drawn, because it takes a tenth of a command's time.
"""

from __future__ import annotations

import functools
import json
import math
import re
import sys
from typing import TYPE_CHECKING, TextIO

from hpcft.cli.table_formats import as_tsv

if TYPE_CHECKING:
    from rich.console import Console, JustifyMethod
    from rich.table import Table

# Characters that a terminal obeys (C0 and C1 controls except tab and line feed), that change the
# direction of a line, and halves of surrogate pairs, which no stream can encode.
_CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]+"
)


def on_terminal(stream: TextIO) -> bool:
    """Returns whether a stream is a terminal, and not a file or a pipe."""
    return stream.isatty()


@functools.cache
def stderr_console() -> Console:
    """Returns the rich console that draws on stderr."""
    return _console(stderr=True)


@functools.cache
def _stdout_console() -> Console:
    return _console(stderr=False)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, emoji=False, soft_wrap=True)


def say(text: str) -> None:
    """Prints a line for the user on stderr."""
    sys.stderr.write(clean(text) + "\n")


def error(text: str) -> None:
    """Prints an error on stderr."""
    _say_labelled("error:", "bold red", text)


def warn(text: str) -> None:
    """Prints a warning on stderr."""
    _say_labelled("warning:", "yellow", text)


def _say_labelled(label: str, style: str, text: str) -> None:
    if on_terminal(sys.stderr):
        stderr_console().print(f"[{style}]{label}[/] {_escape(text)}")
    else:
        say(f"{label} {text}")


def data(text: str) -> None:
    """Prints text on stdout without control sequences, in a pipe too: it may end at a terminal."""
    sys.stdout.write(clean(text if text.endswith("\n") else text + "\n"))


def as_json(value: object) -> None:
    """Prints a value as JSON on stdout; control characters are escaped, so that none is lost.

    Numbers that are not finite become null, because JSON has no such numbers.
    """
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, default=str)
    data(_CONTROL.sub(lambda run: "".join(f"\\u{ord(c):04x}" for c in run[0]), text))


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(header: list[str], cells: list[list[str]], *, right: set[str] | None = None) -> None:
    """Prints a table on a terminal, and tab-separated lines in a pipe.

    On a terminal that is too narrow for the table, each row becomes a block of lines.

    Args:
        header: titles of the columns.
        cells: texts, row by row.
        right: titles of the columns that are aligned to the right.
    """
    if not on_terminal(sys.stdout):
        data(as_tsv(header, cells))
        return
    out = _stdout_console()
    if _width(header, cells) <= out.width:
        out.print(rich_table(header, cells, right=right), soft_wrap=False)
    else:
        longest = max(map(len, header))
        for line in cells:
            out.print(f"[bold]{_escape(line[0])}[/]")
            for title, cell in zip(header[1:], line[1:], strict=True):
                if cell:
                    out.print(f"  {title:{longest}}  {_escape(cell)}")


def rich_table(
    header: list[str],
    cells: list[list[str]],
    *,
    right: set[str] | None = None,
    drop: tuple[str, ...] = (),
) -> Table:
    """Returns a table to draw, without the columns that are empty in every row.

    Args:
        header: titles of the columns.
        cells: texts, row by row.
        right: titles of the columns that are aligned to the right.
        drop: titles of columns to leave out, one after the other, while the table is too wide.
    """
    from rich.table import Table

    used = _used(header, cells)
    for title in drop:
        kept = [i for i in used if header[i] != title]
        shown = [[line[i] for i in used] for line in cells]
        if _width([header[i] for i in used], shown) > stderr_console().width:
            used = kept
    drawn = Table(box=None, header_style="bold", pad_edge=False)
    for i in used:
        justify: JustifyMethod = "right" if header[i] in (right or set()) else "left"
        drawn.add_column(header[i], justify=justify, overflow="fold")
    for line in cells:
        drawn.add_row(*(_escape(line[i]) for i in used))
    return drawn


def _used(header: list[str], cells: list[list[str]]) -> list[int]:
    """Returns the indices of the columns that are not empty; the first one is always among them."""
    return [i for i in range(len(header)) if i == 0 or any(line[i] for line in cells)]


def _width(header: list[str], cells: list[list[str]]) -> int:
    """Returns the number of terminal columns that a table takes without folding."""
    from rich.cells import cell_len

    columns = [[header[i], *(line[i] for line in cells)] for i in _used(header, cells)]
    return sum(max(map(cell_len, column)) + 2 for column in columns) - 2


def raw(block: bytes) -> None:
    """Prints bytes of a log on stdout, without terminal control sequences."""
    sys.stdout.write(clean(block.decode(errors="replace")))
    sys.stdout.flush()


def clean(text: str) -> str:
    """Replaces each run of control characters, which a log or a name may hold, by one mark."""
    return _CONTROL.sub("�", text)


def _escape(text: str) -> str:
    """Escapes rich's markup, so that a text is drawn as it is."""
    from rich.markup import escape

    return escape(clean(text))
