"""Names, docstrings, messages and pages use the field's words, in plain sentences."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import house
from builders import ROOT

MODULES = house.modules()
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])

# Words that no page of Slurm, PyTorch or Hugging Face uses so, and what to say instead.
PRIVATE = {
    r"\brungs?\b": "fallback",
    r"\bladder\b": "fallbacks",
    r"\banew\b": "again, from the start",
    r"\b(?:goes|go|went|gone|going) on\b": "resume, continue",
    r"\b(?:comes?|came|coming) (?:no )?further\b": "make progress",
    r"\bwithout a word\b": "without an error message",
    r"\bin vain\b": "without success",
    r"\b(?:comes?|came) down to\b": "fall back to",
    r"\bqueued? (?:itself )?anew\b": "resubmit",
    r"\bmake-believe\b": "fake",
}
FIRST_WORDS = {"What", "That", "Those", "Of", "It", "They"}


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring, those under fields and constants too."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        for before, part in itertools.pairwise([None, *body]):
            is_text = isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)
            if not (is_text and isinstance(part.value.value, str)):
                continue
            opens = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and not before
            if opens or isinstance(before, ast.Assign | ast.AnnAssign):
                yield part.lineno, part.value.value


def texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every string, the parts of f-strings too: what a user may read."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def private_words(text: str) -> list[str]:
    """The private words in a text, each with the word to use."""
    return [f"{match[0]!r}: say {instead}" for pattern, instead in PRIVATE.items()
            for match in [re.search(pattern, text, re.IGNORECASE)] if match]  # fmt: skip


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_and_messages_have_no_private_words(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    # `rung` alone is the kind of a line that hpcft 0.1 wrote to metrics.jsonl.
    found = [f"line {line}: {word}" for line, text in texts(tree) if text != "rung"
             for word in private_words(text)]  # fmt: skip
    assert found == []


@pytest.mark.parametrize("module", MODULES)
def test_comments_have_no_private_words(module: str) -> None:
    lines = MODULES[module].read_text().splitlines()
    found = [f"line {number}: {word}" for number, line in enumerate(lines, 1) if "#" in line
             for word in private_words(line.partition("#")[2])]  # fmt: skip
    assert found == []


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_begin_with_a_sentence_that_stands_alone(module: str) -> None:
    found = []
    for line, text in docstrings(ast.parse(MODULES[module].read_text())):
        first = text.strip().split("\n")[0]
        if first.split(" ")[0] in FIRST_WORDS or not first:
            found.append(f"line {line}: {first}")
    assert found == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_have_no_private_words(page: Path) -> None:
    lines = page.read_text().splitlines()
    found = [f"line {number}: {word}" for number, line in enumerate(lines, 1)
             for word in private_words(line)]  # fmt: skip
    assert found == []


@pytest.mark.parametrize("text", ["the last rung", "is queued anew", "it goes on", "Went on"])
def test_private_words_are_found(text: str) -> None:
    assert private_words(text)


@pytest.mark.parametrize("text", ["a wrong number", "ongoing", "it resumes", "goes one step"])
def test_other_words_are_not(text: str) -> None:
    assert private_words(text) == []


WORDS = ("plan", "layout", "fallback", "recovery", "calibration", "staging")


@pytest.mark.parametrize("word", WORDS)
def test_words_of_our_own_are_defined_once_and_linked(word: str) -> None:
    explained = [page for page in PAGES if "reference" not in page.parts]
    headings = [p for p in explained if re.search(rf"(?mi)^##+ {word}$", p.read_text())]
    assert headings == [ROOT / "docs" / "concepts.md"]
    links = [page for page in PAGES if f"concepts.md#{word}" in page.read_text()]
    assert links, f"no page links to concepts.md#{word}"


def test_every_module_and_public_name_is_in_the_index() -> None:
    import sys

    sys.path.insert(0, str(ROOT / "docs"))
    import structure

    assert structure.MODULES_PAGE.read_text() == structure.modules_page(), "run `make docs`"
    assert structure.DRAWING.read_text() == structure.drawing(), "run `make docs`"


@pytest.mark.parametrize("module", [m for m in MODULES if house.room_of(m + ".") not in
                                    ("__main__", "cluster", "train")])  # fmt: skip
def test_public_names_have_docstrings(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    bare = [node.name for node in tree.body
            if isinstance(node, ast.ClassDef | ast.FunctionDef)
            and not node.name.startswith("_") and not ast.get_docstring(node)]  # fmt: skip
    assert bare == []
