"""Text is read and written as UTF-8, whatever the locale of the user or the node is."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from builders import ROOT

SOURCES = [
    file for folder in ("launcher", "slurm") for file in sorted((ROOT / folder).rglob("*.py"))
]
# Positional arguments up to the mode, by the last part of the function's name.
_OPENS = {"open": 1, "fdopen": 1, "NamedTemporaryFile": 0, "TemporaryFile": 0}
_NOT_TEXT = {"os", "tarfile", "zipfile", "Image", "wave"}


def calls_without_encoding(tree: ast.AST) -> Iterator[ast.Call]:
    """Yields the calls that read or write text in the locale's encoding."""
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        if "encoding" in keywords or None in keywords:
            continue
        function = call.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        of = function.value if isinstance(function, ast.Attribute) else None
        owner = of.id if isinstance(of, ast.Name) else ""
        text = keywords.get("text") or keywords.get("universal_newlines")
        if (
            (isinstance(text, ast.Constant) and text.value is True)
            or (name == "read_text" and of is not None and not call.args)
            or (name == "write_text" and of is not None and len(call.args) == 1)
        ):
            yield call
        elif (
            name in _OPENS
            and not owner[:1].isupper()
            and (owner not in _NOT_TEXT or name == "fdopen")
        ):
            # A method of Path has no file among its arguments.
            is_method = name == "open" and of is not None and owner not in ("io", "gzip", "lzma")
            place = 0 if is_method else _OPENS[name]
            mode = keywords.get("mode") or (call.args[place] if len(call.args) > place else None)
            default = "r" if name in ("open", "fdopen") else "w+b"
            is_named = isinstance(mode, ast.Constant) and isinstance(mode.value, str)
            if "b" not in (mode.value if is_named else default):
                yield call


@pytest.mark.parametrize(
    ("code", "is_found"),
    [
        ("path.read_text()", True), ("path.write_text('x')", True), ("open(path)", True),
        ("path.open()", True), ("path.open('a')", True), ("os.fdopen(3, 'w')", True),
        ("subprocess.run(c, text=True)", True), ("NamedTemporaryFile('w')", True),
        ("gzip.open(path, 'rt')", True), ("open(path, 'rb')", False), ("path.open('rb')", False),
        ("path.read_text(encoding='utf-8')", False), ("files.write_text(path, text)", False),
        ("os.open(path, os.O_RDONLY)", False), ("Run.open(path)", False),
        ("tempfile.TemporaryFile()", False),
    ],
)  # fmt: skip
def test_calls_without_encoding_are_found(code: str, is_found: bool) -> None:
    assert bool(list(calls_without_encoding(ast.parse(code)))) == is_found


def test_every_text_file_and_pipe_names_its_encoding() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{call.lineno}"
        for file in SOURCES
        for call in calls_without_encoding(ast.parse(file.read_text(encoding="utf-8")))
    ]
    assert found == [], 'add encoding="utf-8"'
