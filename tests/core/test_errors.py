"""Tests of errors and their texts."""

from __future__ import annotations

import pytest

from hpcft.core.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("one\ntwo"), "one"), (ValueError("\n  one \n"), "one"),
     (ValueError(), "ValueError"), (ValueError(" \n"), "ValueError"), (KeyError("x"), "'x'")],
    ids=["two lines", "blank lines", "no text", "only blanks", "a key"],
)  # fmt: skip
def test_first_line_of_an_error(error: BaseException, line: str) -> None:
    assert first_line(error) == line
