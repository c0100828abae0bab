"""Reads CSV, TSV, JSON, JSON Lines, Parquet, Arrow and text files into rows."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from hpcft.core.errors import DataError
from hpcft.core.units import GIB, format_bytes
from hpcft.tasks.base import shorten_list
from hpcft.tasks.data import arrow_rows

NumberedRow = tuple[int, dict[str, Any]]
"""Number of the line (of the row, where there are no lines), from 1, and the row."""

# What a file may hold: so much in any case, and otherwise so many times its own size. Text shrinks
# to a fifth or a twentieth; a few bytes that hold gigabytes are there to fill the memory.
ALWAYS_ALLOWED_BYTES = GIB
LARGEST_RATIO = 400
BYTES_PER_ROW = 250  # of a short row in Python, with its dictionary


class _SizeLimit:
    """Stops the reading of a file that holds many times its own size."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size_bytes = path.stat().st_size
        self.left_bytes = max(ALWAYS_ALLOWED_BYTES, LARGEST_RATIO * self.size_bytes)

    def count(self, read_bytes: int) -> None:
        """Counts what was read.

        Raises:
            DataError: it is too much for a file of this size.
        """
        self.left_bytes -= read_bytes
        if self.left_bytes < 0:
            limit = format_bytes(max(ALWAYS_ALLOWED_BYTES, LARGEST_RATIO * self.size_bytes))
            raise DataError(
                f"{self.path}: its {self.size_bytes:,} bytes hold more than {limit}, which would "
                "fill the memory; if that is meant, write the rows to an uncompressed JSON Lines "
                "file"
            )

    def each(self, rows: Iterator[Any]) -> Iterator[Any]:
        """Counts rows as they are read."""
        for row in rows:
            self.count(BYTES_PER_ROW)
            yield row


class _Unpacked(io.RawIOBase):
    """The content of a gzip file, counted as it is read."""

    def __init__(self, path: Path, limit: _SizeLimit) -> None:
        self._stream = gzip.open(path, "rb")  # noqa: SIM115 -- `close` closes it
        self._limit = limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        self._limit.count(len(data))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


def data_format(path: Path) -> str | None:
    """Returns the suffix that says a file's format, without `.gz`; None if it is not read."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes[-1:] == [".gz"]:
        return suffixes[0] if suffixes[0] in _TEXT_READERS else None
    suffix = path.suffix.lower()
    return suffix if suffix in (*_TEXT_READERS, *_ARROW_READERS) else None


def format_names() -> str:
    """Returns the suffixes of the files that are read, for messages."""
    texts, others = ", ".join(_TEXT_READERS), ", ".join(_ARROW_READERS)
    return f"{texts} (each also with .gz), {others}"


def read_file(path: Path, delimiter: str | None = None) -> Iterator[NumberedRow]:
    """Reads the rows of a file in the format of its suffix; JSON Lines if it has another one.

    In CSV everything is text, as it stands in the file. An empty cell, `null` and NaN are missing.

    Args:
        path: the file.
        delimiter: character between the cells of a line; None for that of the format.

    Raises:
        DataError: a line cannot be read, or the file holds many times its own size.
    """
    kind = data_format(path) or ".jsonl"
    try:
        limit = _SizeLimit(path)
        if reader := _ARROW_READERS.get(kind):
            yield from enumerate(limit.each(reader(path, limit.count)), 1)
        elif delimiter is not None:
            yield from limit.each(_read_delimited(path, limit, delimiter))
        else:
            yield from limit.each(_TEXT_READERS[kind](path, limit))
    except UnicodeDecodeError:
        fix = "convert it, for example with iconv"
        raise DataError(f"{path}:{_first_line_not_utf8(path)}: is not UTF-8; {fix}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        what = "ends too early" if isinstance(error, EOFError) else f"is damaged: {error}"
        raise DataError(f"{path}: the gzip file {what}; copy or pack it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _open_bytes(path: Path, limit: _SizeLimit) -> io.BufferedReader:
    if path.suffix.lower() == ".gz":
        return io.BufferedReader(_Unpacked(path, limit), 1 << 20)
    return path.open("rb")


def _open_text(path: Path, limit: _SizeLimit, newline: str | None = None) -> TextIO:
    return io.TextIOWrapper(_open_bytes(path, limit), encoding="utf-8-sig", newline=newline)


def _first_line_not_utf8(path: Path) -> int:
    with _open_bytes(path, _SizeLimit(path)) as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1


def _read_csv(path: Path, limit: _SizeLimit) -> Iterator[NumberedRow]:
    return _read_delimited(path, limit, ",")


def _read_tsv(path: Path, limit: _SizeLimit) -> Iterator[NumberedRow]:
    return _read_delimited(path, limit, "\t")


def _read_delimited(path: Path, limit: _SizeLimit, delimiter: str) -> Iterator[NumberedRow]:
    csv.field_size_limit(2**31 - 1)  # the default of 131,072 is less than a long text
    with _open_text(path, limit, newline="") as stream:
        # Without `strict`, a quote that is never closed silently swallows the rest of the file.
        reader = csv.DictReader(stream, strict=True, delimiter=delimiter)
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
            kind = "TSV" if delimiter == "\t" else "CSV"
            raise DataError(f"{path}:{reader.line_num + 1}: is not {kind}: {error}") from None


def _read_json(path: Path, limit: _SizeLimit) -> Iterator[NumberedRow]:
    """Reads a list of objects or, as `Dataset.to_json` writes it, an object on each line."""
    with _open_text(path, limit) as stream:
        blank = 0
        while (first := stream.readline()) and not first.strip():
            blank += 1
        if first.lstrip().startswith("{") and _is_json(first):
            yield from _lines_of_json(path, itertools.chain([first], stream), blank + 1)
            return
        rows = _parse_json(path, blank + 1, first + stream.read())
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of objects, or an object on each line")
    yield from ((number, _check_object(path, number, row)) for number, row in enumerate(rows, 1))


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _read_jsonl(path: Path, limit: _SizeLimit) -> Iterator[NumberedRow]:
    with _open_text(path, limit) as stream:
        yield from _lines_of_json(path, stream)


def _lines_of_json(path: Path, lines: Iterable[str], start: int = 1) -> Iterator[NumberedRow]:
    for number, line in enumerate(lines, start):
        if line.strip():
            yield number, _check_object(path, number, _parse_json(path, number, line))


def _read_text(path: Path, limit: _SizeLimit) -> Iterator[NumberedRow]:
    """Reads each line as a row with the column `text`."""
    with _open_text(path, limit) as stream:
        for number, line in enumerate(stream, 1):
            yield number, {"text": line.removesuffix("\n")}


def _parse_json(path: Path, start: int, text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_constant)
    except json.JSONDecodeError as error:
        line = start + error.lineno - 1
        what = f"is not JSON: {error.msg}, column {error.colno}"
        raise DataError(f"{path}:{line}: {what}") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; 100,000 brackets
        raise DataError(f"{path}:{start}: cannot be read: {error}") from None


def _constant(word: str) -> float | None:
    """Returns the value of a number that JSON does not have: a NaN of pandas is a missing value."""
    return None if word == "NaN" else float(word)


def _check_object(path: Path, number: int, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{path}:{number}: expected an object {{…}}, got {type(row).__name__}")
    return row


_TEXT_READERS: dict[str, Callable[[Path, _SizeLimit], Iterator[NumberedRow]]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".txt": _read_text,
}
_ARROW_READERS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    ".parquet": arrow_rows.read_parquet,
    ".arrow": arrow_rows.read_arrow,
}
