"""How many examples each split has, as far as that is known without reading them all."""

from __future__ import annotations

import json
from pathlib import Path

from hpcft.core.records import DataSpec, Split
from hpcft.tasks.data.dataset_folder import prepared_rows
from hpcft.tasks.data.examples import SPLITS, split_sources

# As much of a file is counted, and the rest taken to be alike.
COUNTED_BYTES = 32 * 2**20


def count_examples(data: DataSpec) -> dict[Split, int]:
    """Examples of the splits whose number is known, or cannot be more.

    Local files are counted, of a staged data set it is noted; of others only what `limits` caps is
    known before they are read.
    """
    found: dict[Split, int] = {}
    counted: dict[str, int | None] = {}
    if data.files is not None:
        counted = {split: _rows(Path(file)) for split, file in split_sources(data).items()}
    elif data.path is not None and (noted := prepared_rows(Path(data.path))):
        for split, names in split_sources(data).items():
            parts = [noted.get(name.strip()) for name in names.split("+")]
            counted[split] = None if None in parts else sum(filter(None, parts))
    if counted:
        if data.fractions:
            pool = sum(filter(None, counted.values())) if None not in counted.values() else None
            counted = {s: _share(pool, share) for s, share in data.fractions.items()}
        found = {s: _share(counted[s], data.sample.get(s, 1.0)) for s in SPLITS if counted.get(s)}
    for split, limit in data.limits.items():
        found[split] = min(limit, found.get(split, limit))
    return found


def _share(count: int | None, share: float) -> int:
    return max(1, round(share * count)) if count else 0


def _rows(file: Path) -> int | None:
    """Rows of a file, lines for CSV and JSONL; None where it cannot be read."""
    try:
        if file.suffix.lower() == ".parquet":
            import pyarrow.parquet

            return int(pyarrow.parquet.ParquetFile(file).metadata.num_rows)
        size = file.stat().st_size
        with file.open("rb") as stream:
            block = stream.read(COUNTED_BYTES)
        if file.suffix.lower() == ".json":
            return len(json.loads(block)) if len(block) == size else None
    except (OSError, ValueError):  # told, with its line, when the file is read in earnest
        return None
    lines = block.count(b"\n") + (not block.endswith(b"\n")) - (file.suffix.lower() == ".csv")
    return max(1, round(lines * size / len(block))) if block else None
