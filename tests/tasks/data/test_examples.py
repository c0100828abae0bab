"""Reads users' own data with odd columns, texts and labels; each bad row is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpcft.core.errors import DataError, HpcftError, InputError
from hpcft.tasks.classification import Classification
from hpcft.tasks.data.examples import Examples, check_local_data, load_examples


def classification(data: dict[str, Any], **options: Any) -> Classification:
    made = {"name": "classification", "labels": ["bad", "good"], "data": data, **options}
    return Classification.model_validate_json(json.dumps(made))


def file_of(folder: Path, text: str | bytes, suffix: str = ".jsonl") -> Path:
    path = folder / f"my data ü{suffix}"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def jsonl(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def load_file(path: Path, **options: Any) -> Examples:
    data = {"files": {"train": str(path)}, **options.pop("data", {})}
    return load_examples(classification(data, **options))


def errors_of(path: Path, **options: Any) -> list[str]:
    """Returns the lines of the error, without the folder."""
    with pytest.raises(HpcftError) as error:
        load_file(path, **options)
    assert error.value.exit_code == 2
    return [line.replace(f"{path.parent}/", "") for line in str(error.value).splitlines()]


# ---------------------------------------------------------------- columns and text


COLUMNS = (
    "Review Text",
    "отзыв",
    "a.b",
    "评论 🎬",
    'it\'s "quoted"',
    "$(touch canary)",
    "{x}",
    "1",
)


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows in the format of the file's suffix."""
    if path.suffix == ".csv":
        import csv

        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text(jsonl(*rows), encoding="utf-8")


TEXTS = (
    "plain",
    "emoji 👩‍👩‍👧 🇩🇪",
    "עברית العربية",
    "e\u0301 combining, ﬁ ligature, \u200bzero width",
    'a "quote", a comma; a semicolon',
    "two\nlines\u2028three",
    "long " * 25_000,
)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".json"])
@pytest.mark.parametrize("column", COLUMNS)
def test_load_examples_takes_any_column_name_and_text(
    tmp_path: Path, suffix: str, column: str
) -> None:
    path = tmp_path / f"odd{suffix}"
    write_table(path, [{column: text, "Ist gut?": "good", "rest": 1} for text in TEXTS])
    found = load_file(path, text=column, label="Ist gut?").splits["train"]
    assert found == [{"text": text, "text_pair": None, "label": 1} for text in TEXTS]


def test_load_examples_reads_pair_of_texts(tmp_path: Path) -> None:
    path = file_of(tmp_path, jsonl({"a": "p", "b": "h", "label": "bad"}))
    found = load_file(path, text="a", text_pair="b").splits["train"]
    assert found == [{"text": "p", "text_pair": "h", "label": 0}]


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".jsonl", '\ufeff{"text": "a", "label": "good"}\n \n\n'),
        (".csv", "\ufefftext,label\r\n\r\na,good\r\n\r\n"),
    ],
)
def test_load_examples_skips_byte_order_mark_and_blank_lines(
    tmp_path: Path, suffix: str, text: str
) -> None:
    assert [e["text"] for e in load_file(file_of(tmp_path, text, suffix)).splits["train"]] == ["a"]


def test_load_examples_csv_field_beyond_default_limit(tmp_path: Path) -> None:
    path = file_of(tmp_path, "text,label\n" + "y" * 300_000 + ",good\n", ".csv")
    assert len(load_file(path).splits["train"][0]["text"]) == 300_000


# ---------------------------------------------------------------- empty text


GOOD = {"text": "fine", "label": "good"}


@pytest.mark.parametrize("empty", ["", "  \n\t", "\u3000\u00a0", None])
def test_load_examples_empty_text_is_refused_or_dropped(tmp_path: Path, empty: str | None) -> None:
    path = file_of(tmp_path, jsonl(GOOD, {"text": empty, "label": "bad"}, GOOD))
    (error,) = errors_of(path)
    assert error.startswith("my data ü.jsonl:2 text: the text is empty")
    assert "task.data.drop_empty: true" in error
    kept = load_file(path, data={"drop_empty": True})
    assert len(kept.splits["train"]) == 2
    assert kept.notes == ["train: 1 rows with empty text left out"]


def test_load_examples_file_without_text_is_refused(tmp_path: Path) -> None:
    path = file_of(tmp_path, jsonl({"text": "", "label": "bad"}))
    assert errors_of(path, data={"drop_empty": True}) == ["my data ü.jsonl: has no rows with text"]
    for text in ("", "\n\n", "\ufeff"):
        assert errors_of(file_of(tmp_path, text)) == ["my data ü.jsonl: has no rows"]


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("labels", "value", "index"),
    [
        (["bad", "good"], "good", 1),
        (["bad", "good"], " good ", 1),
        (["bad", "good"], 0, 0),
        (["bad", "good"], "1", 1),
        (["no", "yes"], "no", 0),
        (["1", "0"], 0, 1),  # a label's name goes before an index
        (["1", "2"], 2, 1),
        (["-1", "0", "1"], -1, 0),
        ([" 0", " 1"], " 1", 1),
    ],
)
def test_load_examples_takes_label_by_name_or_index(
    tmp_path: Path, labels: list[str], value: Any, index: int
) -> None:
    path = file_of(tmp_path, jsonl({"text": "a", "label": value}))
    assert load_file(path, labels=labels).splits["train"][0]["label"] == index


@pytest.mark.parametrize(
    ("labels", "value", "what"),
    [
        (["bad", "good"], "great", "expected one of bad, good, got 'great'"),
        (["bad", "good"], "Good", "expected one of bad, good, got 'Good'"),
        (["bad", "good"], "", "expected one of bad, good, got ''"),
        (["bad", "good"], None, "the label is missing; expected one of bad, good"),
        (["bad", "good"], True, "expected one of bad, good, got True"),
        (["bad", "good"], 1.0, "expected one of bad, good, got 1.0"),
        (["bad", "good"], ["good"], "expected one of bad, good, got ['good']"),
        (["bad", "good"], "²", "expected one of bad, good, got '²'"),
        (["bad", "good"], "--1", "expected one of bad, good, got '--1'"),
        (["bad", "good"], "9" * 5000, "expected one of bad, good, got '9999"),
        (["bad", "good"], 2, "expected an index below 2, got 2"),
        (["bad", "good"], -2, "expected an index below 2, got -2"),
        (["bad", "good"], -1, "the row has no label (-1, as in GLUE's test splits)"),
        (["bad", "good"], "-1", "the row has no label (-1, as in GLUE's test splits)"),
        (["1", "2", "3"], 0, "expected one of 1, 2, 3, got 0"),
        ([f"l{n}" for n in range(99)], "x", "l18, l19, … (99 in all), got 'x'"),
    ],
)
def test_load_examples_wrong_label_names_line_and_column(
    tmp_path: Path, labels: list[str], value: Any, what: str
) -> None:
    path = file_of(
        tmp_path, jsonl({"text": "a", "label": labels[0]}, {"text": "b", "label": value})
    )
    (error,) = errors_of(path, labels=labels)
    assert error.startswith("my data ü.jsonl:2 label: ")
    assert what in error
    assert len(error) < 400


def test_load_examples_keeps_label_that_occurs_once(tmp_path: Path) -> None:
    path = file_of(tmp_path, jsonl(*[GOOD] * 5, {"text": "b", "label": "bad"}))
    assert [e["label"] for e in load_file(path).splits["train"]] == [1, 1, 1, 1, 1, 0]


# ---------------------------------------------------------------- rows that cannot be read


@pytest.mark.parametrize(
    ("suffix", "text", "message"),
    [
        (".jsonl", jsonl(GOOD) + '{"text": "a"', ":2: is not JSON: Expecting"),
        (".jsonl", jsonl(GOOD) + "text\n", ":2: is not JSON: Expecting value, column 1"),
        (".jsonl", jsonl(GOOD) + '["a", "good"]\n', ":2: expected an object {…}, got list"),
        (".jsonl", jsonl(GOOD) + "null\n", ":2: expected an object {…}, got NoneType"),
        (".jsonl", "[" * 100_000 + "\n", ":1: cannot be read: maximum recursion"),
        (".jsonl", '\n{"text": "a", "label": %s}\n' % ("9" * 5000), ":2: cannot be read: Exceeds"),
        (".jsonl", jsonl(GOOD).encode() + b'{"text": "caf\xe9"}\n', ":2: is not UTF-8; convert"),
        (".jsonl", '{"text": "\\ud83d", "label": "bad"}', ":1 text: the text holds half of a surr"),
        (".jsonl", '{"text": {"a": 1}, "label": "bad"}', ":1 text: expected text, got dict"),
        (".csv", "text,label\na,good\nb,bad,ugly\n", ":3: more fields than the header has"),
        (".csv", "text,label\na,good\nb\n", ":3 label: the label is missing; expected"),
        (".csv", 'text,label\na,good\n"b,bad\nc,good\n', ":3: is not CSV: unexpected end of data"),
        (".csv", "text,label,text\na,good,b\n", ":1: the header repeats the column text"),
        (".csv", "text;label\na;good\n", ":2 text, label: there is no such column; the row has: "
         "text;label"),
        (".csv", b"text,label\na,good\ncaf\xe9,bad\n", ":3: is not UTF-8"),
        (".json", '[{"text": "a", "label": "good"},\n{"text"]', ":2: is not JSON"),
        (".json", '{"data":\n[]}', ": expected a list of objects, or an object on each line"),
        (".json", jsonl(GOOD) + "no", ":2: is not JSON: Expecting value, column 1"),
        (".json", "[[]]", ":1: expected an object {…}, got list"),
        (".parquet", "PAR1 no", ": is not readable Parquet"),
        (".jsonl", jsonl(GOOD, {"txt": "a", "label": "bad"}), ":2 text: there is no such column; "
         "the row has: txt, label"),
        (".jsonl", jsonl({"a": "x", "b": "y"}), ":1 text, label: there is no such column; the row "
         "has: a, b"),
        (".jsonl", "{}\n", ":1 text, label: there is no such column; the row has: none"),
        (".jsonl", jsonl({f"c{n}": 1 for n in range(300)}), "c18, c19, … (300 in all)"),
    ],
)  # fmt: skip
def test_load_examples_unreadable_file_names_line(
    tmp_path: Path, suffix: str, text: str | bytes, message: str
) -> None:
    (found,) = errors_of(file_of(tmp_path, text, suffix))
    assert found.startswith(f"my data ü{suffix}:")
    assert message in found


def test_load_examples_absent_file_is_refused(tmp_path: Path) -> None:
    assert errors_of(tmp_path / "absent.csv") == [
        "absent.csv: cannot be read: No such file or directory"
    ]
    (tmp_path / "folder.jsonl").mkdir()
    assert errors_of(tmp_path / "folder.jsonl") == ["folder.jsonl: cannot be read: Is a directory"]


def test_load_examples_lists_ten_problems_and_counts_the_rest(tmp_path: Path) -> None:
    bad = {"text": "a", "label": "x"}
    found = errors_of(file_of(tmp_path, jsonl(GOOD, *[bad] * 25)))
    assert len(found) == 11
    assert found[9].startswith("my data ü.jsonl:11 label")
    assert found[10].endswith("… and 15 more rows")


def test_check_local_data_lists_problems_of_all_splits(tmp_path: Path) -> None:
    train = file_of(tmp_path, jsonl({"text": "a", "label": "x"}))
    (tmp_path / "deep").mkdir()
    test = file_of(tmp_path / "deep", jsonl(GOOD, {"text": "", "label": "bad"}))
    with pytest.raises(InputError) as error:
        check_local_data(
            classification({"files": {"train": str(train), "test": str(test)}}), "test"
        )
    assert [p.where for p in error.value.problems] == [f"{train}:1", f"{test}:2"]


# ---------------------------------------------------------------- fractions, samples, limits


def numbered(folder: Path, count: int) -> Path:
    return file_of(folder, jsonl(*({"text": str(n), "label": "good"} for n in range(count))))


def texts(found: Examples) -> dict[str, list[str]]:
    return {split: [e["text"] for e in examples] for split, examples in found.splits.items()}


@pytest.mark.parametrize("count", [10, 97, 1001])
@pytest.mark.parametrize(
    "shares", [(0.7, 0.1, 0.2), (0.8, 0.1, 0.1), (1 / 3, 1 / 3, 1 / 3), (0.6, 0.2, 0.2)]
)
def test_load_examples_fractions_are_disjoint_and_complete(
    tmp_path: Path, count: int, shares: tuple[float, float, float]
) -> None:
    path = numbered(tmp_path, count)
    fractions = dict(zip(("train", "validation", "test"), shares, strict=True))
    found = texts(load_file(path, data={"fractions": fractions}))
    assert sorted(int(t) for part in found.values() for t in part) == list(range(count))
    assert [abs(len(found[s]) - share * count) < 1 for s, share in fractions.items()] == [True] * 3


def test_load_examples_splits_depend_on_seed(tmp_path: Path) -> None:
    path = numbered(tmp_path, 50)

    def cut(**data: Any) -> dict[str, list[str]]:
        return texts(load_file(path, data=data))

    fractions = {"train": 0.5, "test": 0.5}
    assert cut(fractions=fractions, seed=1) == cut(fractions=fractions, seed=1)
    assert cut(fractions=fractions, seed=1) != cut(fractions=fractions, seed=2)
    limits = {"train": 10}
    assert cut(limits=limits, seed=1) == cut(limits=limits, seed=1)
    assert cut(limits=limits, seed=1) != cut(limits=limits, seed=2)


def test_load_examples_fractions_below_one_leave_rows_out(tmp_path: Path) -> None:
    data = {"fractions": {"train": 0.2, "test": 0.2}}
    found = texts(load_file(numbered(tmp_path, 50), data=data))
    assert {split: len(part) for split, part in found.items()} == {"train": 10, "test": 10}
    assert not set(found["train"]) & set(found["test"])


def test_load_examples_fractions_pool_all_files(tmp_path: Path) -> None:
    first, second = numbered(tmp_path, 10), tmp_path / "more.jsonl"
    second.write_text(jsonl(*({"text": str(n), "label": "bad"} for n in range(10, 30))))
    data = {"files": {"train": str(first), "test": str(second)},
            "fractions": {"train": 0.5, "test": 0.5}}  # fmt: skip
    found = texts(load_examples(classification(data)))
    assert sorted(int(t) for part in found.values() for t in part) == list(range(30))
    assert len(found["train"]) == 15


def test_load_examples_fraction_without_row_is_refused(tmp_path: Path) -> None:
    data = {"fractions": {"train": 0.9, "test": 0.01}}
    with pytest.raises(DataError, match=r"0.01 of 10 rows leaves the test split empty"):
        load_file(numbered(tmp_path, 10), data=data)


@pytest.mark.parametrize(
    ("data", "count"),
    [
        ({"limits": {"train": 7}}, 7),
        ({"limits": {"train": 700}}, 40),
        ({"sample": {"train": 0.25}}, 10),
        ({"sample": {"train": 0.001}}, 1),
        ({"sample": {"train": 0.5}, "limits": {"train": 5}}, 5),
        ({"sample": {"train": 0.5}, "limits": {"train": 30}}, 20),
    ],
)
def test_load_examples_samples_and_limits(tmp_path: Path, data: dict[str, Any], count: int) -> None:
    found = load_file(numbered(tmp_path, 40), data={"seed": 3, **data})
    part = [int(t) for t in texts(found)["train"]]
    assert len(set(part)) == len(part) == count
    assert part == sorted(part), "in the order of the file"
    expected = [] if count == 40 else [f"train: {count} of 40 rows, sampled with seed 3"]
    assert found.notes == expected
