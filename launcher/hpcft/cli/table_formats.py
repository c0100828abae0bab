"""Writes tables as TSV, CSV, Markdown or LaTeX; `FORMATS` lists the formats."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable

from hpcft.core import markdown

Header = list[str]
Cells = list[list[str]]


# A spreadsheet takes a cell that begins so for a formula, which can fetch an address or start a
# program. The apostrophe makes it text (OWASP, "CSV injection"). A number stays a number.
_FORMULA = re.compile(r"[=+\-@\t\r\n＝＋－＠]")
_NUMBER = re.compile(r"[+-]?[0-9][0-9_]*(\.[0-9]*)?([eE][+-]?[0-9]+)?%?")


def _not_a_formula(cell: str) -> str:
    """Returns the cell with an apostrophe in front if a spreadsheet would compute it."""
    # Some programs drop blanks in front of a cell before they look at it.
    start = cell.lstrip(" ")
    is_formula = _FORMULA.match(start) and not _NUMBER.fullmatch(start.strip())
    return f"'{cell}" if is_formula else cell


def as_tsv(header: Header, cells: Cells) -> str:
    """Returns tab-separated lines for pipes; tabs and line breaks in cells become blanks."""
    return "\n".join(
        "\t".join(_not_a_formula(" ".join(c.split())) for c in line) for line in [header, *cells]
    )


def as_csv(header: Header, cells: Cells) -> str:
    """Returns CSV as in RFC 4180, with line feeds."""
    stream = io.StringIO()
    # Python's writer leaves a carriage return outside quotes, where it would end the row.
    lines = (
        [_not_a_formula("\n".join(cell.splitlines())) for cell in line] for line in [header, *cells]
    )
    csv.writer(stream, lineterminator="\n").writerows(lines)
    return stream.getvalue().rstrip("\n")


def as_markdown(header: Header, cells: Cells) -> str:
    """Returns a GitHub Markdown table; HTML, links and markup in cells are shown as text."""
    return markdown.table(header, cells)


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
    "×": r"$\times$", "↑": r"$\uparrow$", "↓": r"$\downarrow$",
}  # fmt: skip


def as_latex(header: Header, cells: Cells) -> str:
    """Returns a LaTeX table of the booktabs package."""

    def line(parts: list[str]) -> str:
        cells = ["".join(_LATEX.get(ch, ch) for ch in " ".join(part.split())) for part in parts]
        return " & ".join(cells) + r" \\"

    columns = "l" * len(header)
    return "\n".join(
        [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", line(header), r"\midrule",
         *map(line, cells), r"\bottomrule", r"\end{tabular}"]
    )  # fmt: skip


FORMATS: dict[str, Callable[[Header, Cells], str]] = {
    "tsv": as_tsv,
    "csv": as_csv,
    "md": as_markdown,
    "latex": as_latex,
}
