"""Parses untrusted YAML into plain values and keeps the line of each.

It reads YAML 1.2, in which `no` and `12:00:00` are text. It refuses files over 256 kB, deep
nesting, aliases (and with them alias bombs), explicit tags, duplicate keys, more than one document,
control characters (written out or as an escape), and numbers that are not finite.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcft.core.errors import InputError, Problem, first_line
from hpcft.core.files import read_record
from hpcft.core.records import Record

# This has room for a sweep of 5,000 points, each on a line of 50 characters. The scanner's time
# grows with the square of some texts, such as `!!!!…`: a second for 256 kB, 18 s for 1 MB.
MAX_BYTES = 256_000
MAX_DEPTH = 24
MAX_NODES = 20_000
MAX_DIGITS = 100

# Plain scalars of YAML 1.2.2, 10.3.2 (core schema); every other scalar is text.
_NULL = re.compile(r"null|Null|NULL|~|")
_BOOL = re.compile(r"(true|True|TRUE)|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
# Control characters would reach terminals, scripts and paths; surrogates cannot be encoded.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")

Loc = tuple[str | int, ...]
"""Place of a value in a document: the keys and list indices that lead to it."""
DOTTED_KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
"""A field as people write it, for example `train.seed`."""


@dataclass(frozen=True)
class Origin:
    """Source and line that a value was read from."""

    source: str
    """File name as the user gave it, or a command-line option."""
    line: int | None = None
    """Line, from 1; None for text from the command line."""
    folder: Path | None = None
    """Folder that relative paths in this source start from; None for the current one."""

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass
class Document:
    """Plain values (mappings, lists, scalars) and the origin of each part."""

    value: Any
    """The whole value."""
    origins: dict[Loc, Origin] = field(default_factory=dict)
    """Origin of each part by its place; that of the whole is at `()`."""

    def origin_of(self, loc: Loc) -> Origin:
        """Returns the origin of the value at `loc`, or of the nearest part that encloses it."""
        while loc and loc not in self.origins:
            loc = loc[:-1]
        return self.origins[loc]

    def location_of(self, key: str) -> str:
        """Returns the `file:line`, or the option, that a dotted key was written in."""
        return str(self.origin_of(tuple(key.split("."))))

    def overlaid_with(self, other: Document) -> Document:
        """Returns this document with `other` laid over it: mappings merge, all else is replaced.

        A section whose `name` changes (another task or method) is replaced whole, because the
        options of the old one do not belong to the new one.
        """
        replaced: set[Loc] = set()
        value = _overlay(self.value, other.value, (), replaced)

        def is_replaced(loc: Loc) -> bool:
            return any(loc[: len(part)] == part for part in replaced)

        origins = {loc: origin for loc, origin in self.origins.items() if not is_replaced(loc)}
        origins |= {loc: other.origin_of(loc) for loc in replaced}
        origins |= {loc: origin for loc, origin in other.origins.items() if is_replaced(loc)}
        return Document(value, origins)

    def without_section(self, key: str) -> Document:
        """Returns this document without a section, but with the section's own origin."""
        value = {name: part for name, part in self.value.items() if name != key}
        origins = {loc: o for loc, o in self.origins.items() if loc[:1] != (key,) or len(loc) == 1}
        return Document(value, origins)

    def nested_at(self, loc: Loc) -> Document:
        """Returns a document that holds nothing but this one, at `loc`."""
        value = self.value
        for key in reversed(loc):
            value = {key: value}
        outer = {loc[:length]: self.origin_of(()) for length in range(len(loc))}
        inner = {(*loc, *below): origin for below, origin in self.origins.items()}
        return Document(value, outer | inner)


def stored_document(file: Path, kind: type[Record]) -> Document:
    """Returns a record of a run folder as a document, without fields that a newer hpcft added.

    Args:
        file: the record's file.
        kind: class of the record.

    Raises:
        StoreError: the file cannot be read, or is not such a record.
    """
    return Document(read_record(file, kind).model_dump(mode="json"), {(): Origin(str(file))})


def _overlay(base: Any, over: Any, loc: Loc, replaced: set[Loc]) -> Any:
    """Returns `base` overlaid with `over`; adds to `replaced` the parts that came from `over`."""
    both_mappings = isinstance(base, dict) and isinstance(over, dict)
    if not both_mappings or (
        len(loc) == 1 and "name" in over and base.get("name") not in (None, over["name"])
    ):
        replaced.add(loc)
        return over
    value = dict(base)
    for key, part in over.items():
        if key not in base:
            replaced.add((*loc, key))
            value[key] = part
        else:
            value[key] = _overlay(base[key], part, (*loc, key), replaced)
    return value


def load_document(path: Path, shown_as: str | None = None) -> Document:
    """Reads a YAML file.

    Args:
        path: the file.
        shown_as: name of the file in errors; by default the path.

    Raises:
        InputError: it is missing, too large, not UTF-8, or not the YAML that is accepted here.
    """
    source = shown_as or str(path)
    try:
        if not path.is_file():
            raise InputError([Problem(source, "", *_no_file(path))])
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
        raise InputError(
            [Problem(source, "", what, "correct the name or its permissions")]
        ) from None
    if len(content) > MAX_BYTES:
        what = f"expected at most {MAX_BYTES // 1000} kB, got more"
        fix = "move data into files of its own and name them here"
        raise InputError([Problem(source, "", what, fix)])
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        what = "expected UTF-8 text, got other bytes"
        raise InputError([Problem(f"{source}:{line}", "", what, "save it as UTF-8")]) from None
    return parse_document(text, Origin(source, 1, path.absolute().parent))


def _no_file(path: Path) -> tuple[str, str]:
    """Returns why a path is no file that can be read, and what to do."""
    if path.is_dir():
        return "is a folder, expected a file", "name the file in it"
    if path.exists():  # A pipe has no folder, from which the paths in a recipe would start.
        return "is a pipe or a device, expected a regular file", "write it to a file and name that"
    return "there is no such file", "correct the name"


def parse_document(text: str, origin: Origin) -> Document:
    """Parses YAML.

    Args:
        text: the YAML.
        origin: names the text in errors; its line, if it has one, is that of the first line.

    Raises:
        InputError: it is not the YAML that is accepted here.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    def error_at(line: int | None, what: str, fix: str = "") -> InputError:
        where = f"{origin.source}:{line}" if line and origin.line else origin.source
        return InputError([Problem(where, "", what, fix)])

    bad = _UNPRINTABLE.search(text)
    if bad:
        line = text.count("\n", 0, bad.start()) + 1
        raise error_at(line, f"has a control character (U+{ord(bad[0]):04X})", "remove it")
    try:
        for line, what, fix in _not_accepted(YAML(typ="safe", pure=True).parse(io.StringIO(text))):
            raise error_at(line, what, fix)
        node = YAML(typ="safe", pure=True).compose(io.StringIO(text))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = f"is not valid YAML: {error.problem or error.context}"
        raise error_at(mark.line + 1 if mark else None, what) from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise error_at(None, f"is not valid YAML: {first_line(error)}") from None
    builder = _Builder(origin)
    value = builder.build(node, ()) if node is not None else None
    if builder.problems:
        raise InputError(builder.problems)
    builder.origins.setdefault((), origin)
    return Document(value, builder.origins)


def _not_accepted(events: Any) -> Iterator[tuple[int, str, str]]:
    """Yields line, reason and fix of what is not accepted, before a tree is built."""
    from ruamel.yaml import events as ev

    depth = nodes = 0
    for event in events:
        line = event.start_mark.line + 1 if event.start_mark else 1
        if getattr(event, "anchor", None) is not None:  # an anchor, or the alias that names one
            fix = "write the values out; `extends:` shares between recipes"
            yield line, "aliases (`&name`, `*name`) are not accepted", fix
        if isinstance(event, ev.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, ev.NodeEvent):
            nodes += 1
            depth += isinstance(event, ev.CollectionStartEvent)
        elif isinstance(event, ev.DocumentStartEvent) and event.version not in (None, (1, 2)):
            version = ".".join(map(str, event.version))
            yield line, f"YAML {version} is not accepted, only 1.2", "remove the %YAML line"
        tag = getattr(event, "tag", None)
        if tag is not None:
            yield line, f"tags ({str(tag)[:40]}) are not accepted", "remove the tag"
        if depth > MAX_DEPTH:
            yield line, f"nested deeper than {MAX_DEPTH} levels", "nest it less"
        if nodes > MAX_NODES:
            fix = "move data into files of its own and name them here"
            yield line, f"has more than {MAX_NODES:,} values", fix


class _Builder:
    """Turns composed nodes into plain values, and collects their lines and the problems."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.origins: dict[Loc, Origin] = {}
        self.problems: list[Problem] = []

    def _origin_of(self, node: Any) -> Origin:
        line = node.start_mark.line + 1 if self.origin.line else None
        return Origin(self.origin.source, line, self.origin.folder)

    def _add_problem(self, node: Any, loc: Loc, what: str, fix: str = "") -> None:
        self.problems.append(Problem(str(self._origin_of(node)), dotted_key(loc), what, fix))

    def build(self, node: Any, loc: Loc) -> Any:
        """Returns the plain value of a node at `loc`."""
        from ruamel.yaml.nodes import MappingNode, SequenceNode

        self.origins[loc] = self._origin_of(node)
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
            self._add_problem(node, loc, what, "remove the escape")
        if node.style:  # quoted, or a block: text, whatever it looks like
            return text
        try:
            return _plain(text)
        except ValueError:
            self._add_problem(
                node, loc, f"expected a number that JSON can hold, got {text[:20]}", "quote it"
            )
            return None

    def _mapping(self, node: Any, loc: Loc) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key, str):
                self._add_problem(key_node, loc, "expected text as key, got a list or a mapping")
                continue
            key_loc = (*loc, key)
            if _UNPRINTABLE.search(key):
                self._add_problem(
                    key_node, loc, "has a control character in a key", "remove the escape"
                )
            elif key in result:
                first = self.origins[key_loc].line
                what = "duplicate key" + (f", first on line {first}" if first else "")
                self._add_problem(key_node, key_loc, what, "keep one of them")
            else:
                result[key] = self.build(value_node, key_loc)
                self.origins[key_loc] = self._origin_of(key_node)
        return result


def _plain(text: str) -> Any:
    """Returns the value of an unquoted scalar.

    Raises:
        ValueError: it is a number that JSON cannot hold.
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
    """Joins a place to a dotted key: `("train", "seed")` to `train.seed`."""
    return ".".join(str(part) for part in loc)
