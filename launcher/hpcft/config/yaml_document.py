"""A YAML document with the line of every value: the door through which strangers' text comes in.

YAML 1.2, so that `no` is text and `12:00:00` is text. Refused: files over 256 kB, deep nesting,
aliases (and with them alias bombs), explicit tags, duplicate keys, more than one document, control
characters (written out or as an escape), numbers that are not finite.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcft.core.errors import InputError, Problem
from hpcft.core.files import read_record
from hpcft.core.records import Record

# Room for a sweep of 5,000 points, each written out on a line of 50 characters. The scanner takes
# time with the square of some texts, `!!!!…` above all: a second for this much, 18 s for 1 MB.
MAX_BYTES = 256_000
MAX_DEPTH = 24
MAX_NODES = 20_000
MAX_DIGITS = 100

# YAML 1.2.2, 10.3.2 (core schema): what a plain scalar stands for; all else is text.
_NULL = re.compile(r"null|Null|NULL|~|")
_BOOL = re.compile(r"(true|True|TRUE)|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
# Control characters (they would reach terminals, scripts and paths) and halves of surrogate pairs.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")

Loc = tuple[str | int, ...]
DOTTED_KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
"""A field, as `dotted` writes it and people do."""


@dataclass(frozen=True)
class Origin:
    """Where a value was written."""

    source: str
    """File name as the user gave it, or the command-line option."""
    line: int | None = None
    """Line, from 1; None for text from the command line."""
    folder: Path | None = None
    """Folder that relative paths in this source start from."""

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass
class Document:
    """A plain value (mappings, lists, scalars) and the origin of each part of it."""

    value: Any
    origins: dict[Loc, Origin] = field(default_factory=dict)

    def origin_of(self, loc: Loc) -> Origin:
        """Origin of the value at `loc`, or of the nearest part that encloses it."""
        while loc and loc not in self.origins:
            loc = loc[:-1]
        return self.origins[loc]

    def merged(self, other: Document) -> Document:
        """This document overlaid with `other`: mappings merge, all else is replaced.

        A section whose `name` changes (another task or method) is replaced whole, because the
        options of the old one do not belong to the new one.
        """
        taken: set[Loc] = set()
        value = _overlaid(self.value, other.value, (), taken)

        def is_taken(loc: Loc) -> bool:
            return any(loc[:length] in taken for length in range(len(loc) + 1))

        origins = {loc: origin for loc, origin in self.origins.items() if not is_taken(loc)}
        origins |= {loc: other.origin_of(loc) for loc in taken}
        origins |= {loc: origin for loc, origin in other.origins.items() if is_taken(loc)}
        return Document(value, origins)

    def without(self, key: str) -> Document:
        """This document without a section; where the section stood is still known."""
        value = {name: part for name, part in self.value.items() if name != key}
        origins = {loc: o for loc, o in self.origins.items() if loc[:1] != (key,) or len(loc) == 1}
        return Document(value, origins)

    def placed(self, loc: Loc) -> Document:
        """This document as the part at `loc` of a larger one."""
        value = self.value
        for key in reversed(loc):
            value = {key: value}
        outer = {loc[:length]: self.origin_of(()) for length in range(len(loc))}
        inner = {(*loc, *below): origin for below, origin in self.origins.items()}
        return Document(value, outer | inner)


def stored_document(file: Path, kind: type[Record]) -> Document:
    """Returns a record of a run folder as a document; what a newer hpcft added is left out.

    Raises:
        StoreError: it cannot be read.
    """
    return Document(read_record(file, kind).model_dump(mode="json"), {(): Origin(str(file))})


def _overlaid(base: Any, over: Any, loc: Loc, taken: set[Loc]) -> Any:
    """`base` overlaid with `over`; notes in `taken` which parts came from `over`."""
    both_mappings = isinstance(base, dict) and isinstance(over, dict)
    if not both_mappings or (
        len(loc) == 1 and "name" in over and base.get("name") not in (None, over["name"])
    ):
        taken.add(loc)
        return over
    value = dict(base)
    for key, part in over.items():
        if key not in base:
            taken.add((*loc, key))
            value[key] = part
        else:
            value[key] = _overlaid(base[key], part, (*loc, key), taken)
    return value


def load_document(path: Path, shown_as: str | None = None) -> Document:
    """The document in a YAML file.

    Args:
        path: the file.
        shown_as: how errors name it; by default as given.

    Raises:
        InputError: it is missing, too large, not UTF-8, or not the YAML that is accepted here.
    """
    source = shown_as or str(path)
    try:
        if not path.is_file():
            raise InputError([Problem(source, "", "there is no such file")])
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError([Problem(source, "", f"cannot be read: {error.strerror}")]) from None
    if len(content) > MAX_BYTES:
        what = f"expected at most {MAX_BYTES // 1000} kB, got more"
        fix = "data belongs into files that the document names"
        raise InputError([Problem(source, "", what, fix)])
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        what = "expected UTF-8 text, got other bytes"
        raise InputError([Problem(f"{source}:{line}", "", what)]) from None
    return parse_document(text, Origin(source, 1, path.absolute().parent))


def parse_document(text: str, origin: Origin) -> Document:
    """The document in a text; `origin` names it in errors.

    Raises:
        InputError: it is not the YAML that is accepted here.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    def refused(line: int | None, what: str, fix: str = "") -> InputError:
        where = f"{origin.source}:{line}" if line and origin.line else origin.source
        return InputError([Problem(where, "", what, fix)])

    bad = _UNPRINTABLE.search(text)
    if bad:
        line = text.count("\n", 0, bad.start()) + 1
        raise refused(line, f"has a control character (U+{ord(bad[0]):04X})", "remove it")
    try:
        for line, what in _out_of_bounds(YAML(typ="safe", pure=True).parse(io.StringIO(text))):
            raise refused(line, what, "write the values out; `extends:` shares between recipes")
        node = YAML(typ="safe", pure=True).compose(io.StringIO(text))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = f"is not valid YAML: {error.problem or error.context}"
        raise refused(mark.line + 1 if mark else None, said) from None
    except (YAMLError, ValueError, RecursionError) as error:
        first = (str(error).splitlines() or ["unreadable"])[0]
        raise refused(None, f"is not valid YAML: {first}") from None
    builder = _Builder(origin)
    value = builder.build(node, ()) if node is not None else None
    if builder.problems:
        raise InputError(builder.problems)
    builder.origins.setdefault((), origin)
    return Document(value, builder.origins)


def _out_of_bounds(events: Any) -> Iterator[tuple[int, str]]:
    """Line and reason of what is not accepted, from the event stream: before a tree is built."""
    from ruamel.yaml import events as ev

    depth = nodes = 0
    for event in events:
        line = event.start_mark.line + 1 if event.start_mark else 1
        if getattr(event, "anchor", None) is not None:  # an anchor, or the alias that names one
            yield line, "aliases (`&name`, `*name`) are not accepted"
        if isinstance(event, ev.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, ev.NodeEvent):
            nodes += 1
            depth += isinstance(event, ev.CollectionStartEvent)
        elif isinstance(event, ev.DocumentStartEvent) and event.version not in (None, (1, 2)):
            yield line, f"YAML {'.'.join(map(str, event.version))} is not accepted, only 1.2"
        tag = getattr(event, "tag", None)
        if tag is not None:
            yield line, f"tags ({str(tag)[:40]}) are not accepted"
        if depth > MAX_DEPTH:
            yield line, f"nested deeper than {MAX_DEPTH} levels"
        if nodes > MAX_NODES:
            yield line, f"has more than {MAX_NODES:,} values"


class _Builder:
    """Turns composed nodes into plain values, noting lines and collecting problems."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.origins: dict[Loc, Origin] = {}
        self.problems: list[Problem] = []

    def _at(self, node: Any) -> Origin:
        line = node.start_mark.line + 1 if self.origin.line else None
        return Origin(self.origin.source, line, self.origin.folder)

    def _refuse(self, node: Any, loc: Loc, what: str, fix: str = "") -> None:
        self.problems.append(Problem(str(self._at(node)), dotted_key(loc), what, fix))

    def build(self, node: Any, loc: Loc) -> Any:
        from ruamel.yaml.nodes import MappingNode, SequenceNode

        self.origins[loc] = self._at(node)
        if isinstance(node, MappingNode):
            return self._mapping(node, loc)
        if isinstance(node, SequenceNode):
            return [self.build(item, (*loc, index)) for index, item in enumerate(node.value)]
        return self._scalar(node, loc)

    def _scalar(self, node: Any, loc: Loc) -> Any:
        text: str = node.value
        bad = _UNPRINTABLE.search(text)
        if bad:
            what = f"has a control character (U+{ord(bad[0]):04X})"
            self._refuse(node, loc, what, "remove the escape")
        if node.style:  # quoted, or a block: text, whatever it looks like
            return text
        try:
            return _plain(text)
        except ValueError:
            self._refuse(node, loc, f"expected a number that JSON can hold, got {text[:20]}")
            return None

    def _mapping(self, node: Any, loc: Loc) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key, str):
                self._refuse(key_node, loc, "expected text as key")
                continue
            here = (*loc, key)
            if _UNPRINTABLE.search(key):
                self._refuse(key_node, loc, "has a control character in a key", "remove the escape")
            elif key in result:
                first = self.origins[here].line
                what = "duplicate key" + (f", first on line {first}" if first else "")
                self._refuse(key_node, here, what, "keep one of them")
            else:
                result[key] = self.build(value_node, here)
                self.origins[here] = self._at(key_node)
        return result


def _plain(text: str) -> Any:
    """What an unquoted scalar stands for.

    Raises:
        ValueError: a number that JSON cannot hold.
    """
    if _NULL.fullmatch(text):
        return None
    if truth := _BOOL.fullmatch(text):
        return truth[1] is not None
    is_whole = _INT.fullmatch(text)
    if is_whole and len(text) <= MAX_DIGITS:
        return int(text, 0 if text[:2] in ("0x", "0o") else 10)
    if not is_whole and _FLOAT.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    if is_whole or _FLOAT.fullmatch(text) or _NOT_FINITE.fullmatch(text):
        raise ValueError(text)
    return text


def dotted_key(loc: Loc) -> str:
    """`("train", "seed")` as `train.seed`."""
    return ".".join(str(part) for part in loc)
