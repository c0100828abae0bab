"""How long training pauses for a checkpoint: written to the run folder, and to a disk of the node.

The same training writes a checkpoint each few steps, once straight into its run folder, once by way
of a folder in memory, which stands for the fast disk of a node. What the ranks log is the result.

python benchmarks/checkpoints/run.py [--runs FOLDER] [--near FOLDER] [--markdown FILE]
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
from conftest import RECIPE, film_rows, write_rows  # noqa: E402
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
SAFE = re.compile(r"is safe after ([\d.]+) s")

PAGE = """# What a checkpoint costs

Made by `python benchmarks/checkpoints/run.py --markdown docs/checkpoints.md`: full fine-tuning of a
BERT of {millions:.0f} million parameters, ZeRO-3 on two ranks of one machine, {count} checkpoints
of {mb:,.0f} MB each. The node's disk is a folder in memory, and what copies takes of the same two
cores as training. Seconds, the median of {count} saves.

| written to | training pauses | the checkpoint is safe after |
| --- | ---: | ---: |
{rows}
"""


def measured(folder: Path, near: Path | None) -> tuple[list[float], list[float]]:
    """Trains in a run folder of its own, and returns pauses and times until all was safe.

    Args:
        folder: the run folder, which is made.
        near: the node's disk; None: there is none.

    Raises:
        SystemExit: the training failed.
    """
    starts.made(folder, Path("saves.yaml"), *CHANGES)
    paths = RunPaths(folder)
    site = read_record(paths.cluster, Cluster)
    disk = str(near) if near else None
    write_record(paths.cluster, site.model_copy(update={"node_disk_path": disk}))
    codes = starts.start(folder)
    log = (folder / "logs/0.log").read_text()
    if any(codes):
        raise SystemExit(f"exit codes {codes}\n{log}")
    pauses, safe = ([float(s) for s in found.findall(log)] for found in (PAUSE, SAFE))
    return pauses, safe


def main() -> None:
    """Measures both, and prints the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=Path, help="where run folders are made; default: here")
    parser.add_argument("--near", type=Path, default=Path("/dev/shm"), help="the node's disk")
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
        for name, near in (("the run folder", None), ("the node's disk first", options.near)):
            folder = Path(made) / name.replace(" ", "-")
            pauses, safe = measured(folder, near)
            count = len(pauses)
            lines.append(
                f"| {name} | {statistics.median(pauses):.1f} | {statistics.median(safe):.1f} |"
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
