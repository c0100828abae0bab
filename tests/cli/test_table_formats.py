"""Tests of tables as TSV, CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io

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


def test_as_latex_escapes_special_characters() -> None:
    lines = table_formats.as_latex(HEADER, CELLS).split("\n")
    assert lines[0] == r"\begin{tabular}{ll}"
    assert lines[4] == r'made & a "b", c d | e f \\'
    assert lines[5] == (
        r"x\_1 \& 50\% \#\$\textasciitilde{}\textasciicircum{}\textbackslash{}\{\} & "
        r"0.8 $\pm$ 0.1 $\times$ 2 \\"
    )
    assert lines[6:] == [r"\bottomrule", r"\end{tabular}"]
