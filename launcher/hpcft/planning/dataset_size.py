"""Counts the examples of each split, as far as possible without reading them all."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path

from hpcft.core.records import DataSpec, Split
from hpcft.tasks.data.dataset_folder import prepared_rows
from hpcft.tasks.data.examples import SPLITS, split_sources
from hpcft.tasks.data.file_readers import data_format

# Rows are counted in the first part of a file; the rest is assumed to have rows of the same size.
COUNTED_BYTES = 32 * 2**20


def count_examples(data: DataSpec) -> dict[Split, int]:
    """Returns the number of examples of each split, or an upper bound, where it is known.

    Local files are counted, and staging has written down the rows of a staged data set. Of others
    only what `limits` caps is known before they are read.
    """
    examples: dict[Split, int] = {}
    counted: dict[str, int | None] = {}
    if data.files is not None:
        counted = {split: _count_rows(Path(file)) for split, file in split_sources(data).items()}
    elif data.path is not None and (rows := prepared_rows(Path(data.path))):
        for split, names in split_sources(data).items():
            parts = [rows.get(name.strip()) for name in names.split("+")]
            counted[split] = None if None in parts else sum(filter(None, parts))
    if counted:
        if data.fractions:
            pool = sum(filter(None, counted.values())) if None not in counted.values() else None
            counted = {s: _share(pool, share) for s, share in data.fractions.items()}
        examples = {
            s: _share(counted[s], data.sample.get(s, 1.0)) for s in SPLITS if counted.get(s)
        }
    for split, limit in data.limits.items():
        examples[split] = min(limit, examples.get(split, limit))
    return examples


def _share(count: int | None, share: float) -> int:
    return max(1, round(share * count)) if count else 0


def _count_rows(file: Path) -> int | None:
    """Returns the rows of a file, lines where there are lines; None where it cannot be read."""
    kind = data_format(file)
    try:
        if kind == ".parquet":
            import pyarrow.parquet

            return int(pyarrow.parquet.ParquetFile(file).metadata.num_rows)
        size = file.stat().st_size
        with file.open("rb") as packed:
            is_gzip = file.suffix.lower() == ".gz"
            stream = gzip.GzipFile(fileobj=packed) if is_gzip else packed
            block = stream.read(COUNTED_BYTES)
            read_bytes = packed.tell()
        if kind == ".json" and block.lstrip()[:1] == b"[":
            return len(json.loads(block)) if len(block) < COUNTED_BYTES else None
    except (OSError, ValueError, EOFError, zlib.error):
        return None  # The error is reported, with its line, when the run reads the file.
    if kind == ".arrow":
        return None
    lines = block.count(b"\n") + (not block.endswith(b"\n")) - (kind in (".csv", ".tsv"))
    return max(1, round(lines * size / read_bytes)) if block else None
