"""Mutates documents and files by a seed, so that a case that fails can be repeated."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

# Replacements for a value, as they are written in YAML.
SCALARS = (
    "", "~", "null", "yes", "no", "true", "0", "-1", "1", "2", "0.5", "-0.0", "1e308", "1e309",
    "1e-400", ".nan", "-.inf", "0x10", "0o17", "9" * 19, "9" * 99, "-" + "9" * 101, "1_000",
    "12:30:00", "2024-01-01", "!!python/object/apply:os.system [id]", "!!binary aGk=", "!x y",
    "&a b", "*a", "<<", "<<: *a", "[]", "{}", "[[]]", "[1, a, null]", "{a: 1}", "{1: 2, ~: 3}",
    "[" * 30 + "]" * 30, "[" * 999, "{a: " * 40, "? x", "'", '"', '"\\x00"', '"\\e[31m"',
    '"\\ud800"', '"\\U0001F600"', '"\\u202e"', "| \n  two\n  lines", "> \n  folded", "auto",
    "\u202etxet", "日本", "🙂" * 50, "e\u0301", "a\u2028b", "\ufeff", "x" * 5000, "../../x",
    "/etc/passwd", "/dev/zero", "/proc/self/environ", "/proc/self/fd", "~", "~root", "~nobody/x",
    "$HOME", "$(id)", "`id`", "%j", "%(x)s", "{0}", "a\\", "-", "--help", "a b", "a/b/c", "..",
    "[bold]x[/bold]", "[/]", ".", "/", "http://localhost/x", "bert", "llama", "full", "lora",
    "prompting", "frozen", "slurm", "local", "cuda", "cpu",
)  # fmt: skip
LINES = (
    "---", "...", "%YAML 1.1", "%YAML 1.2", "%TAG ! tag:x,2000:", "&a [*a]", "<<: *a", "<<: {a: b}",
    "? [a, b]\n: c", "? {a: b}\n: c", "\tname: x", "- x", ": x", "name: again", "a: &b 1\nc: *b",
    "l0: &l0 [x,x,x,x]\nl1: &l1 [*l0,*l0,*l0]\nl2: [*l1,*l1,*l1]", "extends: case.yaml",
    "extends: ../recipes", "extends: quickstart", "extends: /dev/zero", "resources: auto", "# c",
    "sweep: {seeds: [1, 2, 3]}", "sweep: {grid: {train.seed: [1, 1]}}",
    "sweep: {list: [{}, {a: 1}]}",
    "sweep: {grid: {sweep.grid: [1]}}", "sweep: {zip: {train.seed: [], name: [a]}}",
    "sweep: {grid: {task: [1, {name: prompting}], method.name: [full, frozen]}}",
    "sweep: {grid: {a.b.c.d: [1]}, seeds: [" + "1," * 999 + "]}", "baseline: {source: x}",
)  # fmt: skip
MARKS = (
    "\0", "\x1b[2J", "\x07", "\x7f", "\x85", "\u2028", "\u2029", "\ufeff", "\ufffe", "\t", "\r",
    "\r\n", "\n", "'", '"', "#", ": ", "- ", "{", "}", "[", "]", ",", "|", ">", "!", "!!", "&", "*",
    "%", "@", "`", "\\", "🙂", "\U0010ffff", "\u0301", " ", "    ",
)  # fmt: skip


def places(value: Any, loc: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Returns the paths of all parts of a value."""
    if not isinstance(value, dict | list):
        return []
    found = []
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        found += [(*loc, key), *places(part, (*loc, key))]
    return found


def changed(value: Any, loc: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    """Returns a copy of a value, after `change(parent, key)` at one path."""
    copy = json.loads(json.dumps(value))
    parent = copy
    for key in loc[:-1]:
        parent = parent[key]
    change(parent, loc[-1])
    return copy


def written(value: Any, depth: int = 0) -> str:
    """Returns a value as YAML in block style."""
    indent = "  " * depth
    if isinstance(value, dict) and value:
        return "\n" + "".join(f"{indent}{key}:{written(v, depth + 1)}" for key, v in value.items())
    if isinstance(value, list) and value:
        return "\n" + "".join(f"{indent}-{written(part, depth + 1)}" for part in value)
    return f" {json.dumps(value, ensure_ascii=False)}\n"


def structure(rng: random.Random, value: Any) -> str:
    """Returns a document with parts replaced, removed, renamed, wrapped or repeated."""
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        found = places(value)
        if not found:
            break
        loc, scalar, other = rng.choice(found), rng.choice(SCALARS), rng.choice(found)
        part = value
        for key in other:
            part = part[key]

        def change(parent: Any, key: Any, scalar: str = scalar, part: Any = part) -> None:
            kind = rng.randrange(8)
            if kind == 0:
                del parent[key]
            elif kind == 1:
                parent[key] = part
            elif kind == 2 and isinstance(parent, dict):
                parent[rng.choice((scalar.split("\n")[0], f"{key}x", str(key)[:-1]))] = parent.pop(
                    key
                )
            elif kind == 3:
                parent[key] = [parent[key]] * rng.choice((1, 2, 300))
            elif kind == 4:
                parent[key] = {"name": parent[key]}
            else:
                parent[key] = f"\0raw{SCALARS.index(scalar)}\0"

        value = changed(value, loc, change)
    text = written(value).lstrip("\n")
    for index, scalar in enumerate(SCALARS):
        text = text.replace(json.dumps(f"\0raw{index}\0"), scalar)
    return text


def lines(rng: random.Random, text: str) -> str:
    """Returns a text with lines inserted, removed, repeated, exchanged or indented."""
    rows = text.splitlines()
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, to = rng.randrange(len(rows)), rng.randrange(len(rows))
        kind = rng.randrange(8)
        if kind == 0:
            rows.insert(at, rng.choice(LINES))
        elif kind == 1 and len(rows) > 1:
            del rows[at]
        elif kind == 2:
            rows.insert(to, rows[at])
        elif kind == 3:
            rows[at], rows[to] = rows[to], rows[at]
        elif kind == 4:
            rows[at] = rng.choice(("\t", " ", "    ", "- ", "? ", "!t ", "&a ", "*a ")) + rows[at]
        elif kind == 5:
            place = rng.randrange(len(rows[at]) + 1)
            rows[at] = rows[at][:place] + rng.choice(MARKS) + rows[at][place:]
        elif kind == 6:
            key, colon, _ = rows[at].partition(":")
            rows[at] = f"{key}{colon} {rng.choice(SCALARS)}"
        else:
            rows[at] = rows[at] * rng.choice((2, 50, 1000))
    ending = rng.choice(("\n", "\n", "\n", "\r\n", "\r", "\n\n"))
    return rng.choice(("", "", "", "\ufeff", "---\n")) + ending.join(rows) + ending


def content(rng: random.Random, data: bytes) -> bytes:
    """Returns bytes with some flipped, cut off, inserted, removed, repeated or moved."""
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, to = (rng.randrange(len(data) + 1) for _ in range(2))
        kind = rng.randrange(7)
        if kind == 0 and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at]
        elif kind == 2:
            data = data[:at] + rng.randbytes(rng.choice((1, 2, 40))) + data[at:]
        elif kind == 3:
            data = data[:at] + data[at + rng.choice((1, 5, 60)) :]
        elif kind == 4:
            data = data[:at] + data[at : at + 40] * rng.choice((2, 30, 400)) + data[at:]
        elif kind == 5:
            data = data[:at] + rng.choice(MARKS).encode() * rng.choice((1, 100)) + data[at:]
        else:
            low, high = sorted((at, to))
            data = data[high:] + data[low:high] + data[:low]
    return data


def document(seed: int, text: str, value: Any) -> bytes:
    """Returns the mutation of a document that belongs to a seed."""
    rng = random.Random(seed)
    kind = rng.randrange(10)
    if kind < 5:
        return structure(rng, value).encode()
    return lines(rng, text).encode() if kind < 8 else content(rng, text.encode())
