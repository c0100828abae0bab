"""Prepares CSV and TSV files of the hub as tables of texts, as hpcft reads such files itself.

`datasets` would guess types: 0042 would become 42, and the text None a missing value.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from hpcft.core.files import write_text
from hpcft.tasks.data.dataset_folder import DATASET_INFO, prepared_rows
from hpcft.tasks.data.file_readers import data_format, read_file

ROWS_AT_ONCE = 10_000


def are_delimited(files: Mapping[str, Sequence[Path]]) -> bool:
    """Returns whether the files of all splits are CSV or TSV."""
    kinds = {data_format(file) for paths in files.values() for file in paths}
    return bool(kinds) and kinds <= {".csv", ".tsv"}


def write_tables(
    files: Mapping[str, Sequence[Path]],
    folder: Path,
    *,
    delimiter: str | None,
    class_names: Mapping[str, Sequence[str]],
) -> None:
    """Writes a folder with a table of texts for each split, unless it is there already.

    Args:
        files: CSV or TSV files by split.
        folder: the folder; it is complete, or does not exist.
        delimiter: character between the cells of a line; None for that of the format.
        class_names: names of the classes of `ClassLabel` columns.

    Raises:
        DataError: a line cannot be read.
        OSError: the folder cannot be written.
    """
    if prepared_rows(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        counts = {
            split: _write_table(paths, made / f"texts-{split}.arrow", delimiter, class_names)
            for split, paths in files.items()
        }
        splits = {split: {"num_examples": count} for split, count in counts.items()}
        write_text(made / DATASET_INFO, json.dumps({"splits": splits}))
        made.chmod(folder.parent.stat().st_mode & 0o777)
        for file in made.iterdir():
            file.chmod(folder.parent.stat().st_mode & 0o666)
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _write_table(
    files: Sequence[Path],
    table: Path,
    delimiter: str | None,
    class_names: Mapping[str, Sequence[str]],
) -> int:
    """Writes the rows of some files as an Arrow file; returns their number."""
    import pyarrow

    rows = (row for file in files for _, row in read_file(file, delimiter))
    first = next(rows, {})
    features = {
        column: {"names": list(names), "_type": "ClassLabel"}
        for column, names in class_names.items()
    }
    schema = pyarrow.schema(
        [(column, pyarrow.string()) for column in first],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    count = 0
    with pyarrow.OSFile(str(table), "wb") as out, pyarrow.ipc.new_stream(out, schema) as writer:
        for block in _blocks(first, rows):
            writer.write_batch(pyarrow.RecordBatch.from_pylist(block, schema=schema))
            count += len(block)
    return count


def _blocks(
    first: dict[str, Any], rows: Iterator[dict[str, Any]]
) -> Iterator[list[dict[str, Any]]]:
    block = [first] if first else []
    while block:
        block += islice(rows, ROWS_AT_ONCE - len(block))
        yield block
        block = list(islice(rows, 1))
