"""A row means the same in each file format, wherever the file is named."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpcft.core.errors import DataError, HpcftError
from hpcft.core.units import GIB, KIB, MIB
from hpcft.tasks.classification import Classification
from hpcft.tasks.data import file_readers
from hpcft.tasks.data.examples import Examples, check_local_data, load_examples
from hpcft.tasks.few_shot.task import FewShot

Rows = list[dict[str, Any]]
NAMES = ["ham", "spam"]


# ---------------------------------------------------------------- writers


def write_csv(path: Path, rows: Rows, delimiter: str = ",") -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_lines(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path: Path, rows: Rows) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_arrow(path: Path, rows: Rows) -> None:
    import pyarrow

    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as out:
        out.write_table(table)


def write_stream(path: Path, rows: Rows) -> None:
    import pyarrow

    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)


WRITERS: dict[str, tuple[str, Callable[[Path, Rows], None]]] = {
    "CSV": (".csv", write_csv),
    "TSV": (".tsv", lambda path, rows: write_csv(path, rows, "\t")),
    "JSON Lines": (".jsonl", write_lines),
    "NDJSON": (".ndjson", write_lines),
    "JSON": (".json", lambda path, rows: path.write_text(json.dumps(rows))),
    "indented JSON": (".json", lambda path, rows: path.write_text(json.dumps(rows, indent=1))),
    "JSON Lines called JSON": (".json", write_lines),
    "Parquet": (".parquet", write_parquet),
    "Arrow file": (".arrow", write_arrow),
    "Arrow stream": (".arrow", write_stream),
}
PACKED = [name for name, (suffix, _) in WRITERS.items() if suffix not in (".parquet", ".arrow")]
FORMATS = [(name, is_gzip) for name in WRITERS for is_gzip in (False, True)[: 1 + (name in PACKED)]]
ANY_FORMAT = pytest.mark.parametrize(
    ("kind", "is_gzip"), FORMATS, ids=[name + " gz" * packed for name, packed in FORMATS]
)


def write(folder: Path, split: str, rows: Rows, kind: str, *, is_gzip: bool = False) -> Path:
    """Writes rows in a format; returns the file."""
    suffix, writer = WRITERS[kind]
    folder.mkdir(exist_ok=True)
    path = folder / f"{split}{suffix}"
    writer(path, rows)
    if not is_gzip:
        return path
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return packed


def classification(data: dict[str, Any], labels: list[str], **options: Any) -> Classification:
    made = {"name": "classification", "labels": labels, "data": data, **options}
    return Classification.model_validate_json(json.dumps(made))


def by_files(path: Path, labels: list[str], **data: Any) -> Examples:
    return load_examples(classification({"files": {"train": str(path)}, **data}, labels))


def by_path(folder: Path, labels: list[str], **data: Any) -> Examples:
    return load_examples(
        classification({"path": str(folder), "splits": {"train": "train"}, **data}, labels)
    )


def labels_of(found: Examples) -> list[int]:
    return [example["label"] for example in found.splits["train"]]


# ---------------------------------------------------------------- texts


# What pandas, or the types that a reader guesses, would turn into something else.
TEXTS = ["4", "0042", "null", "NA", "None", "nan", "N/A", "1e5", "-inf", "true", "3.10",
         "2020-01-01", " padded ", 'a "quote", a comma; a\ttab', "two\nlines", "ünï 评论 🎬",
         "#REF!", "a\u2028b"]  # fmt: skip
TEXT_LABELS = ["None", "NA", "nan", "4", "0042"]
TEXT_ROWS: Rows = [
    {"text": text, "label": TEXT_LABELS[n % 5], "rest": n} for n, text in enumerate(TEXTS)
]
EXPECTED = [{"text": text, "text_pair": None, "label": n % 5} for n, text in enumerate(TEXTS)]


@ANY_FORMAT
def test_load_examples_gives_texts_as_they_are(tmp_path: Path, kind: str, is_gzip: bool) -> None:
    path = write(tmp_path / "data", "train", TEXT_ROWS, kind, is_gzip=is_gzip)
    assert by_files(path, TEXT_LABELS).splits["train"] == EXPECTED
    assert by_path(path.parent, TEXT_LABELS).splits["train"] == EXPECTED


def test_load_examples_gives_texts_of_saved_and_prepared_data_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    saved = datasets.Dataset.from_list(TEXT_ROWS)
    saved.save_to_disk(tmp_path / "alone")
    datasets.DatasetDict(train=saved).save_to_disk(tmp_path / "saved")
    write(tmp_path / "hub", "train", TEXT_ROWS, "Parquet")
    builder = datasets.load_dataset_builder(str(tmp_path / "hub"), cache_dir=str(tmp_path / "c"))
    builder.download_and_prepare()
    for folder in (tmp_path / "alone", tmp_path / "saved", Path(builder.cache_dir)):
        assert by_path(folder, TEXT_LABELS).splits["train"] == EXPECTED


@pytest.mark.parametrize("kind", ["JSON Lines", "Parquet", "Arrow stream"])
@pytest.mark.parametrize("missing", [None, float("nan")], ids=["null", "NaN"])
def test_load_examples_missing_value_is_missing_in_each_format(
    tmp_path: Path, kind: str, missing: float | None
) -> None:
    rows = [{"text": 1.5, "label": "ham"}, {"text": missing, "label": "spam"}]
    path = write(tmp_path / "data", "train", rows, kind)
    for read in (lambda: by_files(path, NAMES), lambda: by_path(path.parent, NAMES)):
        with pytest.raises(HpcftError, match=r"2 text: the text is empty"):
            read()
    kept = by_files(path, NAMES, drop_empty=True)
    assert [example["text"] for example in kept.splits["train"]] == ["1.5"]


@pytest.mark.parametrize("kind", ["JSON Lines", "Parquet"])
def test_load_examples_missing_label_is_not_the_label_none(tmp_path: Path, kind: str) -> None:
    rows = [{"text": "a", "label": "None"}, {"text": "b", "label": None}]
    path = write(tmp_path / "data", "train", rows, kind)
    with pytest.raises(HpcftError, match=r":2 label: the label is missing; expected one of None"):
        by_files(path, ["None", "some"])


# ---------------------------------------------------------------- labels of other types


@ANY_FORMAT
@pytest.mark.parametrize(
    ("labels", "values", "expected"),
    [
        (["False", "True"], [True, False, True], [1, 0, 1]),
        (["true", "false"], [True, False, True], [0, 1, 0]),
        (["0.1", "0.2"], [0.2, 0.1, 0.1], [1, 0, 0]),
        (["1", "2"], [2.0, 1.0, 1.0], [1, 0, 0]),
        (["1.0", "2.0"], [2, 1, 1], [1, 0, 0]),
        (["1", "0"], [0, 1, 1], [1, 0, 0]),
        (["bad", "good"], [0, 1, 1], [0, 1, 1]),
    ],
)
def test_load_examples_finds_label_of_any_type(
    tmp_path: Path, kind: str, is_gzip: bool, labels: list[str], values: list[Any],
    expected: list[int],
) -> None:  # fmt: skip
    rows = [{"text": "a", "label": value} for value in values]
    path = write(tmp_path / "data", "train", rows, kind, is_gzip=is_gzip)
    assert labels_of(by_files(path, labels)) == expected
    assert labels_of(by_path(path.parent, labels)) == expected


@pytest.mark.parametrize("width", ["float16", "float32", "float64"])
def test_load_examples_finds_decimal_label_of_any_width(tmp_path: Path, width: str) -> None:
    import pyarrow
    import pyarrow.parquet

    values = pyarrow.array([0.1, 0.2]).cast(width, safe=False)
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["a", "b"], "label": values}), tmp_path / "train.parquet"
    )
    assert labels_of(by_files(tmp_path / "train.parquet", ["0.2", "0.1"])) == [1, 0]


def test_load_examples_leading_zeros_are_no_other_label(tmp_path: Path) -> None:
    path = write(tmp_path / "data", "train", [{"text": "a", "label": "0042"}], "CSV")
    with pytest.raises(HpcftError, match="expected one of 42, 43, got '0042'"):
        by_files(path, ["42", "43"])


# ---------------------------------------------------------------- names of classes


def class_data(names: list[str] = NAMES, values: tuple[int, ...] = (0, 0, 1)) -> Any:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    )
    content = {"text": [f"text {n}" for n in range(len(values))], "label": list(values)}
    return datasets.Dataset.from_dict(content, features=features)


def class_folders(folder: Path, **options: Any) -> list[dict[str, Any]]:
    """The same class data as Parquet, by `files` and by `path`, saved, and as CSV with a README."""
    data = class_data(**options)
    (folder / "hub").mkdir()
    data.to_parquet(folder / "hub" / "train.parquet")
    data.save_to_disk(folder / "saved")
    write(folder / "card", "train", data.to_list(), "CSV")
    names = "".join(
        f"          '{n}': {name}\n" for n, name in enumerate(data.features["label"].names)
    )
    (folder / "card" / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - {name: text, dtype: string}\n  - name: label\n"
        f"    dtype:\n      class_label:\n        names:\n{names}---\n"
    )
    splits = {"splits": {"train": "train"}}
    return [
        {"files": {"train": str(folder / "hub" / "train.parquet")}},
        *({"path": str(folder / name), **splits} for name in ("hub", "saved", "card")),
    ]


@pytest.mark.parametrize("labels", [NAMES, NAMES[::-1]], ids=["same order", "other order"])
def test_load_examples_names_classes_as_the_data_do(tmp_path: Path, labels: list[str]) -> None:
    prompt = {"name": "prompting", "prompt": "{text}", "labels": labels}
    for data in class_folders(tmp_path):
        expected = [labels.index(NAMES[n]) for n in (0, 0, 1)]
        assert labels_of(load_examples(classification(data, labels))) == expected, data
        asked = FewShot.model_validate_json(json.dumps({**prompt, "data": data}))
        assert labels_of(load_examples(asked)) == expected, data


def test_load_examples_other_names_than_the_data_are_refused_once(tmp_path: Path) -> None:
    for data in class_folders(tmp_path, values=(0, 1) * 20):
        with pytest.raises(HpcftError) as error:
            load_examples(classification(data, ["bad", "good"]))
        (line,) = str(error.value).splitlines()
        assert "the data set calls its classes ham, spam, and task.labels are bad, good" in line
        assert "list the data set's own names in task.labels, in any order" in line


def test_load_examples_class_names_that_are_numbers_say_nothing(tmp_path: Path) -> None:
    for data in class_folders(tmp_path, names=["0", "1"]):
        assert labels_of(load_examples(classification(data, NAMES))) == [0, 0, 1]


def test_load_examples_row_without_class_has_no_label(tmp_path: Path) -> None:
    class_data(values=(0, -1)).save_to_disk(tmp_path / "saved")
    with pytest.raises(HpcftError, match=r"the row has no label \(-1"):
        by_path(tmp_path / "saved", NAMES)


# ---------------------------------------------------------------- indices from 1 on


TOPICS = ["world", "sports", "business", "science"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 2, 3], r"as indices, 1 to 3, and never as 0 \(world\)\. Indices begin at 0"),
        ([0, 1, 2], r"never as 3 \(science\)"),
        ([1, 2, 3, 4], r"expected an index below 4, got 4; indices begin at 0"),
    ],
)
def test_check_local_data_indices_that_do_not_cover_the_labels_are_refused(
    tmp_path: Path, values: list[int], message: str
) -> None:
    rows = [{"text": "a", "label": value} for value in values]
    path = write(tmp_path / "data", "train", rows * 3, "CSV")
    with pytest.raises(HpcftError, match=message):
        check_local_data(classification({"files": {"train": str(path)}}, TOPICS), "train")


def test_check_local_data_indices_of_all_splits_count_before_sampling(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": value} for value in range(4)]
    train = write(tmp_path / "data", "train", rows[:3] * 5, "CSV")
    test = write(tmp_path / "data", "test", rows[3:], "JSON Lines")
    data = {"files": {"train": str(train), "test": str(test)}, "limits": {"train": 1}}
    assert len(check_local_data(classification(data, TOPICS), "test").splits["train"]) == 1
    named = write(tmp_path / "data", "few", [{"text": "a", "label": "sports"}], "CSV")
    check_local_data(classification({"files": {"train": str(named)}}, TOPICS), "train")


# ---------------------------------------------------------------- files that fill the memory


def bomb(folder: Path, kind: str) -> Path:
    """A small file whose rows take 60 GB, or 40 MB."""
    import pyarrow
    import pyarrow.parquet

    if kind == "gzip":
        path = folder / "train.csv.gz"
        with gzip.open(path, "wb") as stream:
            stream.write(b"text,label\n")
            stream.write(b"a" * 40 * MIB)
        return path
    if kind == "rows":
        path, table = folder / "train.parquet", pyarrow.table({"text": pyarrow.nulls(200_000)})
        pyarrow.parquet.write_table(table, path, compression="zstd")
        return path
    indices = pyarrow.array([0] * 60_000, "int32")
    texts = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array(["x" * MIB]))
    if kind == "text":
        path = folder / "train.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, compression="zstd")
        return path
    table = pyarrow.table({"text": pyarrow.ListArray.from_arrays([0, 60_000], texts)})
    path = folder / "train.arrow"
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as out:
        out.write_table(table)
    return path


@pytest.mark.parametrize("kind", ["text", "nested", "rows", "gzip"])
def test_load_examples_small_file_that_fills_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    import resource

    if kind in ("rows", "gzip"):
        monkeypatch.setattr(file_readers, "ALWAYS_ALLOWED_BYTES", 32 * MIB)
    path = bomb(tmp_path, kind)
    assert path.stat().st_size < 2 * MIB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    task = classification({"files": {"train": str(path)}, "drop_empty": True}, NAMES, label="text")
    with pytest.raises(DataError, match=r"bytes hold more than .* which would fill the memory"):
        load_examples(task)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GIB / KIB


def test_load_examples_reads_a_text_that_many_rows_share(tmp_path: Path) -> None:
    rows = [{"text": "x" * 10_000, "label": NAMES[n % 2]} for n in range(2000)]
    path = write(tmp_path / "data", "train", rows, "Parquet")
    assert len(by_files(path, NAMES).splits["train"]) == 2000


@pytest.mark.parametrize("cut", [10, -3], ids=["damaged", "too short"])
def test_load_examples_broken_gzip_file_says_so(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path / "data", "train", TEXT_ROWS, "CSV", is_gzip=True)
    content = path.read_bytes()
    path.write_bytes(content[:cut] + (b"\xff" * 40 if cut > 0 else b""))
    with pytest.raises(DataError, match=r"train\.csv\.gz: the gzip file"):
        by_files(path, TEXT_LABELS)


# ---------------------------------------------------------------- what lies outside a folder


def card(folder: Path, where: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
        f"    path: {where}\n---\n"
    )


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("../real/train.csv", "a file outside the folder"),
        ("sub/../../real/train.csv", "a file outside the folder"),
        ("{tmp}/real/train.csv", "a file outside the folder"),
        ("[train.csv, ../real/train.csv]", "a file outside the folder"),
        ("https://127.0.0.1:9/train.csv", "a URL"),
        ("zip://train.csv::train.zip", "a URL"),
    ],
)
def test_load_examples_readme_that_names_files_elsewhere_is_refused(
    tmp_path: Path, where: str, what: str
) -> None:
    write(tmp_path / "real", "train", TEXT_ROWS, "CSV")
    write(tmp_path / "data", "train", TEXT_ROWS, "CSV")
    card(tmp_path / "data", where.format(tmp=tmp_path))
    with pytest.raises(DataError, match=f"README.md: names {what} .*identity; copy it"):
        by_path(tmp_path / "data", TEXT_LABELS)
    (tmp_path / "data" / "README.md").rename(tmp_path / "data" / ".huggingface.yaml")
    yaml = (tmp_path / "data" / ".huggingface.yaml").read_text().removesuffix("---\n")
    (tmp_path / "data" / ".huggingface.yaml").write_text(yaml.removeprefix("---\n"))
    with pytest.raises(DataError, match=f"names {what} "):
        by_path(tmp_path / "data", TEXT_LABELS)


def test_load_examples_saved_data_that_name_files_elsewhere_are_refused(tmp_path: Path) -> None:
    class_data().save_to_disk(tmp_path / "real")
    shutil.copytree(tmp_path / "real", tmp_path / "saved")
    state = json.loads((tmp_path / "saved/state.json").read_text())
    name = state["_data_files"][0]["filename"]
    for elsewhere in (f"../real/{name}", f"{tmp_path}/real/{name}"):
        state["_data_files"][0]["filename"] = elsewhere
        (tmp_path / "saved/state.json").write_text(json.dumps(state))
        with pytest.raises(DataError, match=r"lies outside .*identity; copy it into the folder"):
            by_path(tmp_path / "saved", NAMES)


def test_load_examples_linked_folder_is_refused_and_linked_file_is_read(tmp_path: Path) -> None:
    real = write(tmp_path / "real", "train", TEXT_ROWS, "CSV")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.csv").symlink_to(real)
    assert by_path(tmp_path / "files", TEXT_LABELS).splits["train"] == EXPECTED
    (tmp_path / "folders").mkdir()
    (tmp_path / "folders" / "sub").symlink_to(tmp_path / "real")
    card(tmp_path / "folders", "sub/train.csv")
    with pytest.raises(DataError, match="lies outside"):
        by_path(tmp_path / "folders", TEXT_LABELS)


# ---------------------------------------------------------------- descriptions of folders


def test_load_examples_readme_may_set_the_delimiter_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "data", "train", [{"text": "a, b", "label": "ham"}], "CSV")
    file = tmp_path / "data" / "train.csv"
    file.write_text("text;label\na, b;ham\n")
    card(tmp_path / "data", "train.csv\n  sep: ';'")
    (example,) = by_path(tmp_path / "data", NAMES).splits["train"]
    assert example["text"] == "a, b"
    card(tmp_path / "data", "train.csv\n  skiprows: 1")
    with pytest.raises(DataError, match="its README sets skiprows for reading the files"):
        by_path(tmp_path / "data", NAMES)


def test_load_examples_other_format_in_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.xml").write_text("<a/>")
    with pytest.raises(DataError, match=r"train\.xml: expected a file of \.csv, \.tsv, "):
        by_path(tmp_path, NAMES)


def test_load_examples_reads_lines_of_text_files(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("one\n\n two\n", encoding="utf-8")
    assert [row["text"] for _, row in file_readers.read_file(tmp_path / "train.txt")] == [
        "one",
        "",
        " two",
    ]


# ---------------------------------------------------------------- rows that are trained on, too


def split_files(folder: Path, trained: list[str], scored: list[str]) -> dict[str, str]:
    rows = {
        split: [{"text": text, "label": NAMES[len(text) % 2]} for text in texts]
        for split, texts in (("train", trained), ("test", scored))
    }
    return {
        "train": str(write(folder, "train", rows["train"], "CSV")),
        "test": str(write(folder, "test", rows["test"], "JSON Lines")),
    }


def test_load_examples_counts_rows_that_are_trained_on_and_scored(tmp_path: Path) -> None:
    files = split_files(tmp_path / "d", ["a", "bb", "c"], ["a", "a", "bb", "new"])
    task = classification({"files": files}, NAMES)
    (warning,) = load_examples(task, "test").warnings
    assert warning.startswith("test: 3 of 4 examples also stand in the train split")
    assert check_local_data(task, "test", trains=True).warnings == [warning]
    assert load_examples(task).warnings == check_local_data(task, "test").warnings == []
    apart = classification({"files": split_files(tmp_path / "e", ["a"], ["b", "cc"])}, NAMES)
    assert load_examples(apart, "test").warnings == []
