"""Turns Arrow tables into rows: types are kept, what is missing is None, classes have names."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpcft.core.errors import DataError, first_line
from hpcft.tasks.data.class_values import ClassValue, are_numbers

Row = dict[str, Any]
ClassNames = Mapping[str, Sequence[str]]
"""Names of the classes of each `ClassLabel` column."""
ROWS_AT_ONCE = 8192


def class_names(schema: Any) -> dict[str, list[str]]:
    """Returns the class names of `ClassLabel` columns, from the metadata that `datasets` writes."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        found = {
            column: [str(name) for name in feature["names"]]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}
    return {column: names for column, names in found.items() if not are_numbers(names)}


def name_classes(row: Row, names: ClassNames) -> Row:
    """Gives the indices in `ClassLabel` columns the names of the classes, in place."""
    for column, classes in names.items():
        value = row.get(column)
        if isinstance(value, str) and value.strip().isdecimal() and value.strip() not in classes:
            value = int(value)  # CSV has no numbers
        if isinstance(value, int) and not isinstance(value, bool):
            row[column] = ClassValue(value, classes)
    return row


def read_parquet(path: Path, count_bytes: Callable[[int], None]) -> Iterator[Row]:
    """Reads the rows of a Parquet file.

    Args:
        path: the file.
        count_bytes: receives the bytes of the rows that come next, and may raise an error.

    Raises:
        DataError: it is not readable.
    """
    import pyarrow.parquet

    with _readable(path, "Parquet"):
        with pyarrow.parquet.ParquetFile(path) as file:
            metadata = file.metadata
            columns = [
                metadata.row_group(group).column(column)
                for group in range(metadata.num_row_groups)
                for column in range(metadata.num_columns)
            ]
            count_bytes(sum(column.total_uncompressed_size for column in columns))
            repeated = {c.path_in_schema for c in columns if c.has_dictionary_page}
            leaves = [file.schema.column(index) for index in range(metadata.num_columns)]
            texts = [leaf.path for leaf in leaves if leaf.logical_type.type == "STRING"]
        # A long text that many rows share is kept once until its size has been counted.
        shared = [path for path in texts if path in repeated]
        with pyarrow.parquet.ParquetFile(path, read_dictionary=shared) as file:
            yield from _rows_of(file.iter_batches(ROWS_AT_ONCE), count_bytes)


def read_arrow(path: Path, count_bytes: Callable[[int], None]) -> Iterator[Row]:
    """Reads the rows of an Arrow file, in the streaming or the file format.

    Args:
        path: the file.
        count_bytes: receives the bytes of the rows that come next, and may raise an error.

    Raises:
        DataError: it is not readable.
    """
    import pyarrow

    with _readable(path, "Arrow"), pyarrow.memory_map(str(path)) as mapped:
        if mapped.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(mapped)
            batches = (reader.get_batch(n) for n in range(reader.num_record_batches))
            yield from _rows_of(batches, count_bytes)
        else:
            mapped.seek(0)
            yield from _rows_of(pyarrow.ipc.open_stream(mapped), count_bytes)


@contextlib.contextmanager
def _readable(path: Path, file_format: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: is not readable {file_format}: {first_line(error)}") from None


def _rows_of(batches: Iterable[Any], count_bytes: Callable[[int], None]) -> Iterator[Row]:
    for whole in batches:
        names = class_names(whole.schema)
        for first in range(0, whole.num_rows, ROWS_AT_ONCE):
            batch = whole.slice(first, ROWS_AT_ONCE)
            count_bytes(sum(map(_content_bytes, batch.columns)))
            rows = batch.to_pylist()
            for column in batch.schema.names:
                if (values := _as_written(batch.column(column))) is not None:
                    for row, value in zip(rows, values, strict=True):
                        row[column] = value
            yield from (name_classes(row, names) for row in rows)


def _content_bytes(column: Any) -> int:
    """Returns the size of a column's values in bytes, those that rows share counted for each."""
    import pyarrow
    import pyarrow.compute

    if pyarrow.types.is_dictionary(column.type):
        if not (pyarrow.types.is_string(column.type.value_type) and len(column)):
            return int(column.nbytes)
        lengths = pyarrow.compute.binary_length(column.dictionary).cast("int64")
        return int(pyarrow.compute.sum(lengths.take(column.indices)).as_py() or 0)
    if pyarrow.types.is_struct(column.type) or pyarrow.types.is_nested(column.type):
        parts = column.flatten()
        parts = parts if isinstance(parts, list) else [parts]
        return sum(map(_content_bytes, parts))
    return int(column.nbytes)


def _as_written(column: Any) -> list[float | None] | None:
    """Returns numbers as people write them: 0.1 for the 32-bit number that is nearest to 0.1.

    A NaN is a missing value. Columns that are not of floating-point numbers give None.
    """
    import pyarrow

    if not pyarrow.types.is_floating(column.type):
        return None
    values: list[float | None] = column.to_pylist()
    if not pyarrow.types.is_float64(column.type):
        exact = column.to_numpy(zero_copy_only=False)
        values = [None if v is None else float(str(e)) for v, e in zip(values, exact, strict=True)]
    return [None if value is None or value != value else value for value in values]
