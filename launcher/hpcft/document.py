"""A YAML document with the line of every value: the door through which strangers' text comes in.

YAML 1.2, so that `no` is text and `12:00:00` is text. Refused: files over a megabyte, deep nesting,
aliases (and with them alias bombs), explicit tags, duplicate keys, more than one document.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcft.errors import InputError, Problem

MAX_BYTES = 1_000_000
MAX_DEPTH = 24
MAX_NODES = 20_000

Loc = tuple[str | int, ...]


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
        value = {key: _merge(self.value.get(key), part) for key, part in other.value.items()}
        return Document({**self.value, **value}, {**self.origins, **other.origins})


def _merge(base: Any, over: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    if "name" in over and base.get("name") not in (None, over["name"]):
        return over
    return {**base, **{k: _merge(base[k], v) if k in base else v for k, v in over.items()}}


def load(path: Path, shown_as: str | None = None) -> Document:
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
        if path.stat().st_size > MAX_BYTES:
            size_mb = path.stat().st_size / 1e6
            raise InputError(
                [
                    Problem(
                        source,
                        "",
                        f"expected at most {MAX_BYTES // 10**6} MB, got {size_mb:.0f} MB",
                        "data belongs into files that the document names",
                    )
                ]
            )
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise InputError(
            [Problem(f"{source}:{line}", "", "expected UTF-8 text, got other bytes")]
        ) from None
    except OSError as error:
        raise InputError([Problem(source, "", f"cannot be read: {error.strerror}")]) from None
    return parse(text, Origin(source, 1, path.absolute().parent))


def parse(text: str, origin: Origin) -> Document:
    """The document in a text; `origin` names it in errors.

    Raises:
        InputError: it is not the YAML that is accepted here.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        _check_bounds(YAML(typ="safe", pure=True).parse(io.StringIO(text)), origin)
        node = YAML(typ="safe", pure=True).compose(io.StringIO(text))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{origin.source}:{mark.line + 1}" if mark and origin.line else origin.source
        raise InputError([Problem(where, "", f"is not valid YAML: {error.problem}")]) from None
    except (YAMLError, ValueError, RecursionError) as error:
        first = (str(error).splitlines() or ["unreadable"])[0]
        raise InputError([Problem(origin.source, "", f"is not valid YAML: {first}")]) from None
    builder = _Builder(origin)
    value = builder.build(node, ()) if node is not None else None
    if builder.problems:
        raise InputError(builder.problems)
    builder.origins.setdefault((), origin)
    return Document(value, builder.origins)


def _check_bounds(events: Any, origin: Origin) -> None:
    """Refuses aliases, tags, depth and size from the event stream, before any tree is built."""
    from ruamel.yaml import events as ev

    depth = nodes = 0
    for event in events:
        line = event.start_mark.line + 1 if event.start_mark else 1
        where = f"{origin.source}:{line}" if origin.line else origin.source
        what = ""
        if isinstance(event, ev.AliasEvent):
            what = "aliases (`*name`) are not accepted"
        elif isinstance(event, ev.CollectionStartEvent):
            depth += 1
            nodes += 1
        elif isinstance(event, ev.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, ev.ScalarEvent):
            nodes += 1
        tag = getattr(event, "tag", None)
        if tag is not None:
            what = f"tags ({tag}) are not accepted"
        if depth > MAX_DEPTH:
            what = f"nested deeper than {MAX_DEPTH} levels"
        if nodes > MAX_NODES:
            what = f"has more than {MAX_NODES:,} values"
        if what:
            raise InputError(
                [
                    Problem(
                        where, "", what, "write the values out; `extends:` shares between recipes"
                    )
                ]
            )


class _Builder:
    """Turns composed nodes into plain values, noting lines and collecting problems."""

    def __init__(self, origin: Origin) -> None:
        from ruamel.yaml import YAML

        self.origin = origin
        self.origins: dict[Loc, Origin] = {}
        self.problems: list[Problem] = []
        self._construct = YAML(typ="safe", pure=True).constructor.construct_object

    def _at(self, node: Any) -> Origin:
        line = node.start_mark.line + 1 if self.origin.line else None
        return Origin(self.origin.source, line, self.origin.folder)

    def build(self, node: Any, loc: Loc) -> Any:
        from ruamel.yaml.nodes import MappingNode, SequenceNode

        self.origins[loc] = self._at(node)
        if isinstance(node, MappingNode):
            return self._mapping(node, loc)
        if isinstance(node, SequenceNode):
            return [self.build(item, (*loc, index)) for index, item in enumerate(node.value)]
        kind = node.tag.rsplit(":", 1)[-1]
        if kind in ("int", "float", "bool", "null"):
            return self._construct(node)
        return node.value

    def _mapping(self, node: Any, loc: Loc) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            where = self._at(key_node)
            if not isinstance(key_node.value, str):
                self.problems.append(Problem(str(where), dotted(loc), "expected text as key"))
                continue
            key = key_node.value
            here = (*loc, key)
            if key in result:
                self.problems.append(
                    Problem(
                        str(where),
                        dotted(here),
                        f"duplicate key, first on line {self.origins[here].line}",
                        "keep one of them",
                    )
                )
                continue
            result[key] = self.build(value_node, here)
            self.origins[here] = where
        return result


def dotted(loc: Loc) -> str:
    """`("train", "seed")` as `train.seed`."""
    return ".".join(str(part) for part in loc)
