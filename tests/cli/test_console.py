"""Tests of printing: JSON, tables, messages, and control characters."""

from __future__ import annotations

import io
import json
import math
import sys

import pytest

from hpcft.cli import console


def test_as_json_writes_null_for_nan(capsys: pytest.CaptureFixture[str]) -> None:
    console.as_json({"loss": math.nan, "all": [1.5, math.inf, (-math.inf, True)]})
    written = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert written == {"loss": None, "all": [1.5, None, [None, True]]}


def test_as_json_escapes_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    console.as_json({"name": "a\x9b31m\u202eb", "ünï": "日本"})
    text = capsys.readouterr().out
    assert "\\u009b" in text
    assert "\\u202e" in text
    assert "日本" in text
    assert json.loads(text) == {"name": "a\x9b31m\u202eb", "ünï": "日本"}


def test_messages_in_a_pipe_go_to_stderr_with_a_label(capsys: pytest.CaptureFixture[str]) -> None:
    console.say("one\x1b[2J")
    console.warn("two")
    console.error("three")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "one�[2J\nwarning: two\nerror: three\n")


def test_table_in_a_pipe_is_tsv(capsys: pytest.CaptureFixture[str]) -> None:
    console.table(["run", "empty"], [["a\tb", ""], ["c", ""]])
    assert capsys.readouterr().out == "run\tempty\na b\t\nc\t\n"


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [80, 10], ids=["wide", "narrow"])
def test_table_on_a_terminal_leaves_out_empty_columns(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(console, "_stdout_console", lambda: console._console(stderr=False))
    monkeypatch.setenv("COLUMNS", str(columns))
    console.table(["run", "empty", "note"], [["a", "", "[bold]x[/] 1"], ["b", "", ""]])
    text = terminal.getvalue()
    assert "empty" not in text
    assert "[bold]x[/] 1" in text, "markup in a text is not obeyed"
    assert ("run" in text) == (columns == 80), "a narrow terminal gets a block of lines per row"
