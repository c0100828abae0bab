"""The only printer: data to stdout, talk to stderr; a table on a terminal, TSV in a pipe.

What draws is imported only where something is drawn: it takes a tenth of the time of a command.
"""

from __future__ import annotations

import functools
import json
import math
import re
import sys
from typing import TYPE_CHECKING, Any, TextIO

from hpcft.cli.table_formats import as_tsv

if TYPE_CHECKING:
    from rich.console import Console, JustifyMethod
    from rich.table import Table

# What a terminal obeys (C0 and C1 controls but for tab and line feed), what turns the direction of
# a line around, and halves of surrogate pairs, which no stream takes.
_CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]+"
)


def on_terminal(stream: TextIO) -> bool:
    """Whether a person reads the stream, and not a file or a program."""
    return stream.isatty()


@functools.cache
def talk() -> Console:
    """What draws on stderr."""
    return _console(stderr=True)


@functools.cache
def _out() -> Console:
    return _console(stderr=False)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, emoji=False, soft_wrap=True)


def say(text: str) -> None:
    """A line for the person, on stderr."""
    sys.stderr.write(clean(text) + "\n")


def error(text: str) -> None:
    """An error, on stderr."""
    _say_as("error:", "bold red", text)


def warn(text: str) -> None:
    """A warning, on stderr."""
    _say_as("warning:", "yellow", text)


def _say_as(word: str, style: str, text: str) -> None:
    if on_terminal(sys.stderr):
        talk().print(f"[{style}]{word}[/] {_plain(text)}")
    else:
        say(f"{word} {text}")


def data(text: str) -> None:
    """Text on stdout, in a pipe too without control sequences: it may go on to a terminal."""
    sys.stdout.write(clean(text if text.endswith("\n") else text + "\n"))


def as_json(value: Any) -> None:
    """A value as JSON, on stdout; control characters are escaped, so that none is lost.

    What is not finite is null: JSON has no such numbers.
    """
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, default=str)
    data(_CONTROL.sub(lambda found: "".join(f"\\u{ord(c):04x}" for c in found[0]), text))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(header: list[str], cells: list[list[str]], *, right: set[str] | None = None) -> None:
    """A table on a terminal, tab-separated lines in a pipe.

    Where the terminal is too narrow for the table, each line becomes a block of its own.
    """
    if not on_terminal(sys.stdout):
        data(as_tsv(header, cells))
        return
    out = _out()
    if _width(header, cells) <= out.width:
        out.print(rich_table(header, cells, right=right), soft_wrap=False)
    else:
        longest = max(map(len, header))
        for line in cells:
            out.print(f"[bold]{_plain(line[0])}[/]")
            for title, cell in zip(header[1:], line[1:], strict=True):
                if cell:
                    out.print(f"  {title:{longest}}  {_plain(cell)}")


def rich_table(
    header: list[str],
    cells: list[list[str]],
    *,
    right: set[str] | None = None,
    drop: tuple[str, ...] = (),
) -> Table:
    """The table to draw; columns that are empty throughout are left out.

    Args:
        header: titles.
        cells: text.
        right: titles of the columns that are aligned to the right.
        drop: titles of columns to leave out, one after the other, while the table is too wide.
    """
    from rich.table import Table

    used = _used(header, cells)
    for title in drop:
        kept = [i for i in used if header[i] != title]
        shown = [[line[i] for i in used] for line in cells]
        if _width([header[i] for i in used], shown) > talk().width:
            used = kept
    drawn = Table(box=None, header_style="bold", pad_edge=False)
    for i in used:
        justify: JustifyMethod = "right" if header[i] in (right or set()) else "left"
        drawn.add_column(header[i], justify=justify, overflow="fold")
    for line in cells:
        drawn.add_row(*(_plain(line[i]) for i in used))
    return drawn


def _used(header: list[str], cells: list[list[str]]) -> list[int]:
    return [i for i in range(len(header)) if i == 0 or any(line[i] for line in cells)]


def _width(header: list[str], cells: list[list[str]]) -> int:
    """Columns of the terminal that the table takes without folding."""
    from rich.cells import cell_len

    columns = [[header[i], *(line[i] for line in cells)] for i in _used(header, cells)]
    return sum(max(map(cell_len, column)) + 2 for column in columns) - 2


def raw(block: bytes) -> None:
    """Bytes of a log on stdout, with terminal control sequences taken out."""
    sys.stdout.write(clean(block.decode(errors="replace")))
    sys.stdout.flush()


def clean(text: str) -> str:
    """Text with one mark for each run of control characters, which a log or a name may hold."""
    return _CONTROL.sub("�", text)


def _plain(text: str) -> str:
    """Text to be printed as it is where markup is understood."""
    from rich.markup import escape

    return escape(clean(text))
