"""Writes tables as TSV, CSV, Markdown or LaTeX; `FORMATS` lists the formats."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable

Header = list[str]
Cells = list[list[str]]


def as_tsv(header: Header, cells: Cells) -> str:
    """Returns tab-separated lines for pipes; tabs and line breaks in cells become blanks."""
    return "\n".join("\t".join(" ".join(c.split()) for c in line) for line in [header, *cells])


def as_csv(header: Header, cells: Cells) -> str:
    """Returns CSV as in RFC 4180, with line feeds."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([header, *cells])
    return stream.getvalue().rstrip("\n")


def as_markdown(header: Header, cells: Cells) -> str:
    """Returns a GitHub Markdown table."""

    def line(parts: list[str]) -> str:
        return "| " + " | ".join(" ".join(p.split()).replace("|", "\\|") for p in parts) + " |"

    return "\n".join([line(header), line(["---"] * len(header)), *map(line, cells)])


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
