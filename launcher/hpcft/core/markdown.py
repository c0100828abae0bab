"""Writes any text so that Markdown shows it as it is: without markup, HTML or links."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# Marks that mean something in the middle of a line. An underscore within a word does not, and a
# bracket only in front of the address of a link. GitHub makes links of `https://…`, `www.…`, of
# addresses of mail, of names after `@` and of numbers after `#`.
_MARKS = re.compile(
    r"[\\`*|~<&@]|(?<!\w)_|_(?!\w)|\](?=\()|:(?=//)|(?<=www)\.|#(?=\d)", re.IGNORECASE
)
_ENTITIES = {"<": "&lt;", "&": "&amp;", "@": "&#64;", ":": "&#58;", ".": "&#46;", "#": "&#35;"}


def plain_text(text: str) -> str:
    """Returns Markdown that shows a text in one line as it is."""
    one_line = " ".join(text.split())
    return _MARKS.sub(lambda mark: _ENTITIES.get(mark[0], f"\\{mark[0]}"), one_line)


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Returns a GitHub Markdown table whose cells show their texts as they are."""
    rows = [[*map(plain_text, header)], ["---"] * len(header)]
    rows += [[*map(plain_text, line)] for line in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
