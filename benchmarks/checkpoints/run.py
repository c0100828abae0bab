"""Measures how long a checkpoint pauses training, with and without a disk of the node.

The same training writes a checkpoint every few steps: once directly to its run folder, once by way
of a folder in memory, which stands for the fast disk of a node. The times are read from the ranks'
logs.

python benchmarks/checkpoints/run.py [--runs FOLDER] [--node-disk FOLDER] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import starts  # noqa: E402
from builders import RECIPE, film_rows, write_rows  # noqa: E402
from hpcft.core.files import read_record, write_record  # noqa: E402
from hpcft.core.paths import RunPaths  # noqa: E402
from hpcft.core.records import Cluster  # noqa: E402

CHANGES = (
    "model.config.vocab_size=8000", "model.config.hidden_size=768",
    "model.config.num_hidden_layers=6", "model.config.num_attention_heads=12",
    "model.config.intermediate_size=3072",
    "resources.gpus_per_node=2", "resources.zero_stage=3",
    "train.global_batch_size=8", "train.max_steps=24", "train.learning_rate=1e-5",
    "train.save_strategy=steps", "train.save_steps=6", "train.save_total_limit=1",
)  # fmt: skip
PAUSE = re.compile(r"training paused for ([\d.]+) s")
COMPLETE = re.compile(r"checkpoint is complete after ([\d.]+) s")

PAGE = """# Measured: the cost of a checkpoint

Made by `python benchmarks/checkpoints/run.py --markdown docs/reference/measured/checkpoints.md`.

Full fine-tuning of a BERT of {millions:.0f} million parameters, ZeRO-3 on two ranks of one machine,
{count} checkpoints of {mb:,.0f} MB each. The node's disk is a folder in memory, and the copy shares
two cores with training. Times are in seconds, the median of {count} saves.

| written to | training pauses | the checkpoint is complete after |
| --- | ---: | ---: |
{rows}
"""


def measure(folder: Path, node_disk: Path | None) -> tuple[list[float], list[float]]:
    """Trains in a new run folder, and returns the pauses and the times until completion.

    Args:
        folder: the run folder to make.
        node_disk: the node's disk; None for no disk.

    Raises:
        SystemExit: the training failed.
    """
    starts.make_run(folder, Path("saves.yaml"), *CHANGES)
    paths = RunPaths(folder)
    site = read_record(paths.cluster, Cluster)
    disk = str(node_disk) if node_disk else None
    write_record(paths.cluster, site.model_copy(update={"node_disk_path": disk}))
    codes = starts.start(folder)
    log = (folder / "logs/0.log").read_text()
    if any(codes):
        raise SystemExit(f"exit codes {codes}\n{log}")
    pauses, complete = ([float(s) for s in line.findall(log)] for line in (PAUSE, COMPLETE))
    return pauses, complete


def main() -> None:
    """Measures both ways, and prints the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=Path, help="where run folders are made; default: here")
    parser.add_argument("--node-disk", type=Path, default=Path("/dev/shm"), help="the node's disk")
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    output = options.markdown and options.markdown.absolute()
    with tempfile.TemporaryDirectory(prefix="hpcft-saves-", dir=options.runs) as made:
        os.chdir(made)
        rows = film_rows(12)
        write_rows(Path("train.jsonl"), rows)
        write_rows(Path("test.jsonl"), rows[:8])
        Path("saves.yaml").write_text(RECIPE)
        lines, count = [], 0
        for name, disk in (("the run folder", None), ("the node's disk first", options.node_disk)):
            folder = Path(made) / name.replace(" ", "-")
            pauses, complete = measure(folder, disk)
            count = len(pauses)
            lines.append(
                f"| {name} | {statistics.median(pauses):.1f} | {statistics.median(complete):.1f} |"
            )
            (last,) = folder.glob("checkpoints/checkpoint-*")
            size = sum(file.stat().st_size for file in last.rglob("*") if file.is_file())
            weights = (folder / "model/model.safetensors").stat().st_size
            shutil.rmtree(folder)
        os.chdir(ROOT)
    page = PAGE.format(
        rows="\n".join(lines), count=count, mb=size / 1e6, millions=weights / 4 / 1e6
    )
    print(page)
    if output:
        output.write_text(page)


if __name__ == "__main__":
    main()
