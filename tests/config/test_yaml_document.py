"""YAML documents: values, their lines, what is refused, and overlaying."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcft.config import yaml_document
from hpcft.config.yaml_document import MAX_BYTES, MAX_DEPTH, MAX_NODES, Document, Origin
from hpcft.core.errors import InputError, Problem

ORIGIN = Origin("f.yaml", 1, Path("/f"))


def parsed(text: str) -> Document:
    return yaml_document.parse_document(text, ORIGIN)


def refused(text: str) -> list[Problem]:
    with pytest.raises(InputError) as error:
        parsed(text)
    return error.value.problems


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("off", "off"),
        ("y", "y"),
        ("12:00:00", "12:00:00"),
        ("190:20:30", "190:20:30"),
        ("2020-01-01", "2020-01-01"),
        ("=", "="),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("0x", "0x"),
        ("1e-4", 1e-4),
        ("5e-5", 5e-5),
        ("1.", 1.0),
        (".5", 0.5),
        ("1E3", 1000.0),
        ("0x1F", 31),
        ("0o17", 15),
        ("017", 17),
        ("+1", 1),
        ("-3", -3),
        ("true", True),
        ("FALSE", False),
        ("tRuE", "tRuE"),
        ("~", None),
        ("", None),
        ("Null", None),
        ("nUll", "nUll"),
        ("'1'", "1"),
        ('"true"', "true"),
        ('""', ""),
        ("|\n 1", "1"),
        (">\n a\n b", "a b"),
        ('"a\\n\\u00e9"', "a\né"),
        ("العربية 🎓", "العربية 🎓"),
    ],
)
def test_parse_document_reads_scalars_by_yaml_1_2(written: str, meant: Any) -> None:
    value = parsed(f"a: {written}").value["a"]
    assert (value, type(value)) == (meant, type(meant))


def test_keys_are_always_text() -> None:
    assert parsed("no: 1\n1: 2\nnull: 3\n<<: {a: 4}").value == {
        "no": 1, "1": 2, "null": 3, "<<": {"a": 4},
    }  # fmt: skip


def test_origin_of_every_value_has_its_line_and_folder() -> None:
    doc = parsed(
        "# head\na: 1\n\nb:\n  c: |\n    x\n    y\n  d:\n    - 1\n    - {e: 2,\n       f: 3}\n"
    )
    lines = {loc: doc.origin_of(loc).line for loc in doc.origins}
    assert lines[("a",)] == 2
    assert lines[("b",)] == 4
    assert lines[("b", "c")] == 5
    assert lines[("b", "d", 0)] == 9
    assert lines[("b", "d", 1, "e")] == 10
    assert lines[("b", "d", 1, "f")] == 11
    assert str(doc.origin_of(("b", "d", 1, "f"))) == "f.yaml:11"
    assert doc.origin_of(("b", "c")).folder == Path("/f")
    assert doc.origin_of(("b", "missing", "deeper")).line == 4


def test_empty_text_is_an_empty_document() -> None:
    for text in ("", "\n", "# only a remark\n", "---\n", "---\n...\n"):
        assert parsed(text).value is None
        assert str(parsed(text).origin_of(("a",))).startswith("f.yaml:")


def test_duplicate_keys_are_refused_with_both_lines() -> None:
    problems = refused("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\na: 2\n")
    assert [(p.where, p.key) for p in problems] == [("f.yaml:5", "b.c"), ("f.yaml:6", "a")]
    assert "first on line 3" in problems[0].what
    assert "first on line 1" in problems[1].what


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("a: 1\nb: *x", 2, "aliases"),
        ("a: &x 1\nb: *x", 1, "aliases"),
        ("a: &a [1]\nb: &b [*a, *a]\nc: [*b, *b]", 1, "aliases"),
        ("a: 1\nb: !!str 1", 2, "tags"),
        ("a: !!python/object/apply:os.system ['touch canary']", 1, "tags"),
        ("a: 1\nb: ! x", 2, "tags"),
        ("a: 1\n---\nb: 2", 2, "another document"),
        ("%YAML 1.1\n---\na: no", 2, "YAML 1.1"),
        ("a: 1\nb: [1, 2", 2, "not valid YAML"),
        ("a: 1\nb: 'x", 2, "not valid YAML"),
        ("a: 1\n\tb: 2", 2, "not valid YAML"),
        ("a: 1\n b: 2", 2, "not valid YAML"),
        ("a: 1\nb: @x", 2, "not valid YAML"),
        ("a: 1\n}", 2, "not valid YAML"),
        ("a: 1\n? [b]\n: 2", 2, "text as key"),
        ("a: 1\n? {b: c}\n: 2", 2, "text as key"),
        ("a: 1\nb: x\x07y", 2, "control character (U+0007)"),
        ("a: 1\nb: x\0y", 2, "control character (U+0000)"),
        ("a: 1\nb: \x1b[31m", 2, "control character (U+001B)"),
        ('a: 1\nb: "\\0"', 2, "control character (U+0000)"),
        ('a: 1\nb: "\\e[31m"', 2, "control character (U+001B)"),
        ('a: 1\nb: "\\x9b"', 2, "control character (U+009B)"),
        ('a: 1\nb: "\\ud800"', 2, "control character (U+D800)"),
        ('a: 1\n"b\\e": 2', 2, "control character"),
        ("a: 1\nb: .nan", 2, "JSON can hold"),
        ("a: 1\nb: -.inf", 2, "JSON can hold"),
        ("a: 1\nb: 1e999", 2, "JSON can hold"),
        ("a: 1\nb: " + "9" * 5000, 2, "JSON can hold"),
        ("a: 1\nb: 0x" + "f" * 5000, 2, "JSON can hold"),
        ("a:\n" + "".join(f"{' ' * n}b:\n" for n in range(1, 40)), MAX_DEPTH + 1, "nested deeper"),
        ("\n" + "[" * 100_000, 2, "nested deeper"),
        ("- 1\n" * (MAX_NODES + 5), MAX_NODES, "values"),
    ],
)  # fmt: skip
def test_yaml_that_is_not_accepted_is_refused_with_file_and_line(
    text: str, line: int, what: str
) -> None:
    (problem,) = refused(text)
    assert problem.where == f"f.yaml:{line}"
    assert what in problem.what
    assert "\n" not in str(problem)


def test_documents_at_the_limits_are_accepted() -> None:
    assert parsed("[" * MAX_DEPTH + "]" * MAX_DEPTH).value
    assert len(parsed("- 1\n" * (MAX_NODES - 1)).value) == MAX_NODES - 1


def test_text_from_the_command_line_is_named_without_a_line() -> None:
    option = Origin("-o a={b: 1, b: 2}")
    with pytest.raises(InputError, match=r"^-o a={b: 1, b: 2} b: duplicate key; keep one"):
        yaml_document.parse_document("{b: 1, b: 2}", option)
    with pytest.raises(InputError, match=r"^-o a=\[: is not valid YAML"):
        yaml_document.parse_document("[", Origin("-o a=["))


AWKWARD = "ab1.-_:,{}[]#&*!|>'\"%@`?\\ \n\t\r~=<e0xé\x00\u2028\ud800"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(alphabet=st.sampled_from(AWKWARD), max_size=30))
def test_any_text_is_a_document_or_an_input_error(text: str) -> None:
    try:
        sources = {origin.source for origin in parsed(text).origins.values()}
    except InputError as error:
        sources = {problem.where.partition(":")[0] for problem in error.problems}
    assert sources == {"f.yaml"}


# ---------------------------------------------------------------- files


def error_of(path: Path) -> str:
    with pytest.raises(InputError) as error:
        yaml_document.load_document(path)
    return str(error.value)


def test_load_document_keeps_the_folder_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "süß: $(x).yaml"
    path.write_bytes("\ufeffa: ü\r\nb: 2\r\n".encode())
    doc = yaml_document.load_document(path)
    assert doc.value == {"a": "ü", "b": 2}
    assert doc.origin_of(("b",)) == Origin(str(path), 2, tmp_path)


def test_huge_file_is_refused_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.yaml"
    with path.open("wb") as stream:
        stream.truncate(100_000_000)
    started = time.perf_counter()
    error = error_of(path)
    assert time.perf_counter() - started < 0.2
    assert error.startswith(f"{path}: expected at most 256 kB")


def test_file_of_the_largest_size_is_read(tmp_path: Path) -> None:
    path = tmp_path / "big.yaml"
    path.write_text("a: " + "x" * (MAX_BYTES - 3))
    assert len(yaml_document.load_document(path).value["a"]) == MAX_BYTES - 3
    path.write_text("a: " + "x" * (MAX_BYTES - 2))
    assert "expected at most 256 kB" in error_of(path)


def test_file_that_is_not_utf8_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"a: 1\nb: caf\xe9\n")
    assert error_of(path).startswith(f"{path}:2: expected UTF-8")


def test_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", Path("a\0b.yaml")):
        assert error_of(path).startswith(f"{path}: there is no such file")
    assert error_of(tmp_path) == f"{tmp_path}: is a folder, expected a file; name the file in it"
    assert error_of(Path("/dev/zero")).startswith("/dev/zero: is a pipe or a device, expected a")
    assert "cannot be read" in error_of(tmp_path / ("x" * 5000))


# ---------------------------------------------------------------- overlaying


BASE = """\
name: base
task:
  name: classification
  labels: [a, b]
  data:
    name: small
    path: p
train:
  seed: 1
  steps: 5
"""


def over(text: str) -> Document:
    other = yaml_document.parse_document(text, Origin("g.yaml", 1, Path("/g")))
    return parsed(BASE).overlaid_with(other)


def test_overlaid_with_merges_mappings_and_replaces_all_else() -> None:
    doc = over("name: over\ntask:\n  labels: [c]\ntrain: {seed: 2}\n")
    assert doc.value == {
        "name": "over",
        "task": {"name": "classification", "labels": ["c"], "data": {"name": "small", "path": "p"}},
        "train": {"seed": 2, "steps": 5},
    }
    where = {".".join(map(str, loc)): str(doc.origin_of(loc)) for loc in (
        ("name",), ("task",), ("task", "labels"), ("task", "labels", 0), ("task", "labels", 1),
        ("task", "data", "path"), ("train", "seed"), ("train", "steps"))}  # fmt: skip
    assert where == {
        "name": "g.yaml:1",
        "task": "f.yaml:2",
        "task.labels": "g.yaml:3",
        "task.labels.0": "g.yaml:3",
        "task.labels.1": "g.yaml:3",  # base's second label, on f.yaml:4, is replaced
        "task.data.path": "f.yaml:7",
        "train.seed": "g.yaml:4",
        "train.steps": "f.yaml:10",
    }


def test_overlaid_with_replaces_a_section_whose_name_changes() -> None:
    doc = over("\ntask: {name: instruction, prompt: x}")
    assert doc.value["task"] == {"name": "instruction", "prompt": "x"}
    assert str(doc.origin_of(("task", "labels"))) == "g.yaml:2"
    same = over("task: {name: classification, text: t}")
    assert same.value["task"]["labels"] == ["a", "b"]


def test_overlaid_with_keeps_neighbours_of_a_name_below_a_section() -> None:
    doc = over("task: {data: {name: large}}")
    assert doc.value["task"]["data"] == {"name": "large", "path": "p"}


def test_nested_at_keeps_origins_in_a_larger_document() -> None:
    part = yaml_document.parse_document(
        "{a: 1, b: [2]}", Origin("-o x", None, Path("/w"))
    ).nested_at(("train", "z"))
    assert part.value == {"train": {"z": {"a": 1, "b": [2]}}}
    doc = parsed(BASE).overlaid_with(part)
    assert doc.value["train"] == {"seed": 1, "steps": 5, "z": {"a": 1, "b": [2]}}
    assert str(doc.origin_of(("train", "z", "b", 0))) == "-o x"
    assert str(doc.origin_of(("train", "seed"))) == "f.yaml:9"
