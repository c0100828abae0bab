"""Reads CSV, JSON, JSON Lines and Parquet files into rows."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpcft.core.errors import DataError, first_line
from hpcft.tasks.base import shorten_list


def read_file(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Reads a CSV, JSONL, JSON or Parquet file: yields line (or row) number, from 1, and row.

    Raises:
        DataError: a line cannot be read.
    """
    readers = {".parquet": _read_parquet, ".csv": _read_csv, ".json": _read_json}
    try:
        yield from readers.get(path.suffix.lower(), _read_jsonl)(path)
    except UnicodeDecodeError:
        fix = "convert it, for example with iconv"
        raise DataError(f"{path}:{_first_line_not_utf8(path)}: is not UTF-8; {fix}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _first_line_not_utf8(path: Path) -> int:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # the default of 131,072 is less than a long text
    with path.open(encoding="utf-8-sig", newline="") as stream:
        # Without `strict`, a quote that is never closed silently swallows the rest of the file.
        reader = csv.DictReader(stream, strict=True)
        try:
            columns = Counter(reader.fieldnames or ())
            repeated = [name for name, count in columns.items() if count > 1]
            if repeated:
                raise DataError(f"{path}:1: the header repeats the column {shorten_list(repeated)}")
            for row in reader:
                if None in row:
                    raise DataError(f"{path}:{reader.line_num}: more fields than the header has")
                yield reader.line_num, row
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num + 1}: is not CSV: {error}") from None


def _read_json(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = _parse_json(path, 1, path.read_text(encoding="utf-8-sig"))
    if not isinstance(rows, list):
        raise DataError(
            f"{path}: expected a list of objects; "
            "a file with one object per line has to be called .jsonl"
        )
    yield from ((number, _check_object(path, number, row)) for number, row in enumerate(rows, 1))


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield number, _check_object(path, number, _parse_json(path, number, line))


def _parse_json(path: Path, start: int, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = start + error.lineno - 1
        what = f"is not JSON: {error.msg}, column {error.colno}"
        raise DataError(f"{path}:{line}: {what}") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; 100,000 brackets
        raise DataError(f"{path}:{start}: cannot be read: {error}") from None


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: is not readable Parquet: {first_line(error)}") from None


def _check_object(path: Path, number: int, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{path}:{number}: expected an object {{…}}, got {type(row).__name__}")
    return row
