"""Interrupts runs five times each, compares them with undisturbed ones, and measures the cost.

A run of each kind is interrupted at five random steps by five different faults on a real Slurm, and
recovers by itself. Its weights, answers and metrics have to equal those of an undisturbed run, bit
by bit.

python benchmarks/interruptions/run.py [KIND…] [--seed N] [--json FILE] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
for place in ("tests", "tests/faults", "tests/jobs", "slurm/testbed"):
    sys.path.insert(0, str(ROOT / place))

from interrupting import FAULTS, recoveries_of  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402
from test_slurm_runs import QLORA  # noqa: E402

from builders import ASKED, RECIPE, film_rows, llama_folder, write_rows  # noqa: E402
from hpcft.training.modes import answer_log  # noqa: E402
from real_runs import current_step, folder_of, losses, until  # noqa: E402
from testbed import Testbed  # noqa: E402

# Checkpoints every few seconds; a run of hours saves one every half hour.
OFTEN = ["-o", "resources.checkpoint_min=0.05"]
TRAINED = [*OFTEN, "-o", "train.logging_steps=10"]
KINDS: dict[str, tuple[str, list[str]]] = {
    "full ZeRO-3, 4 ranks on 2 nodes": (
        "tiny.yaml",
        [*TRAINED, "-o", "resources.nodes=2", "-o", "resources.gpus_per_node=2",
         "-o", "resources.zero_stage=3", "-o", "train.max_steps=400"],
    ),
    "QLoRA, 2 ranks": ("qlora.yaml", [*TRAINED, "-o", "train.max_steps=400"]),
    "few-shot scoring, 2 ranks": (
        "asked.yaml",
        ["-o", "resources.gpus_per_node=2", "-o", "evaluation.per_device_eval_batch_size=1"],
    ),
}  # fmt: skip
SHORT = {kind: kind.split()[0].strip(",").lower() for kind in KINDS}
EXAMPLES = 12_000


@dataclass
class Interruption:
    """One interruption, and its cost."""

    fault: str
    """Function of `tests/faults/interrupting.py`."""
    step: int
    """Step of the run at the interruption."""
    resumed_from: int
    """Step from which the run resumed."""
    lost_steps: int
    """Number of steps that were repeated."""
    lost_s: float
    """Seconds until the run had reached the same step again."""


def write_data(folder: Path) -> None:
    """Writes the recipes and data of the three kinds."""
    rows = film_rows(12)
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "test.jsonl", rows[:8])
    (folder / "tiny.yaml").write_text(RECIPE)
    (folder / "qlora.yaml").write_text(QLORA)
    (folder / "asked.yaml").write_text(
        ASKED.replace("train.jsonl", "shots.jsonl").replace("test.jsonl", "plays.jsonl")
    )
    for name, count in (("shots", 24), ("plays", EXAMPLES)):
        asked = [{"text": f"{name}, number {n}{' indeed' * (n % 7)}", "label": n % 2}
                 for n in range(count)]  # fmt: skip
        write_rows(folder / f"{name}.jsonl", asked)
    llama_folder(folder / "base")


def hpcft(*arguments: object) -> str:
    """Runs a command of hpcft, which must not fail; returns its output."""
    command = [sys.executable, "-m", "hpcft", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        raise SystemExit(f"{command}: {done.stderr}")
    return done.stdout


def interrupt(
    kind: str, name: str, total: int, testbed: Any, rng: random.Random
) -> list[Interruption]:
    """Submits a run and interrupts it five times; returns the cost of each time."""
    recipe, overrides = KINDS[kind]
    hpcft("submit", recipe, "-c", "testbed", *overrides, "-o", f"name={name}")
    folder = folder_of(name)
    faults = rng.sample(sorted(FAULTS), 5)
    steps = sorted(rng.sample(range(total // 20, total * 9 // 10), 5))
    interruptions = []
    for fault, at in zip(faults, steps, strict=True):
        until(lambda at=at: current_step(folder) >= at, 300.0, f"{name}: step {at}")
        before, step = len(recoveries_of(name)), current_step(folder)
        started = time.monotonic()
        FAULTS[fault](name, testbed)
        until(lambda before=before: len(recoveries_of(name)) > before, 120.0, f"{name}: {fault}")
        until(lambda step=step: current_step(folder) > step and is_training(folder), 300.0, fault)
        resumed_from = recoveries_of(name)[before].step
        lost_s = time.monotonic() - started
        lost_steps = max(step - resumed_from, 0)
        interruptions.append(Interruption(fault, step, resumed_from, lost_steps, lost_s))
        print(f"  {interruptions[-1]}", file=sys.stderr, flush=True)
    hpcft("status", name, "--watch")
    return interruptions


def is_training(folder: Path) -> bool:
    """Returns whether the run has passed its start."""
    return json.loads((folder / "progress.json").read_text())["phase"] != "starting"


def compare(one: Path, other: Path) -> dict[str, bool]:
    """Returns, for each part of two run folders, whether it is the same bit by bit."""
    records = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    is_same = {"metrics": records[0]["metrics"] == records[1]["metrics"]}
    if (one / "model").exists():
        weights = [[load_file(file) for file in sorted((folder / "model").glob("*.safetensors"))]
                   for folder in (one, other)]  # fmt: skip
        is_same["weights"] = bool(weights[0]) and all(
            a.keys() == b.keys() and all((a[key] == b[key]).all() for key in a)
            for a, b in zip(*weights, strict=True)
        )
        is_same["losses"] = losses(one) == losses(other)
    else:
        answers = [answer_log.read_answers(folder / "answers") for folder in (one, other)]
        is_same["answers"] = bool(answers[0]) and answers[0] == answers[1]
    return is_same


def measure(kinds: list[str], seed: int) -> dict[str, Any]:
    """Runs all kinds on a cluster of their own; returns the figures by kind."""
    figures: dict[str, Any] = {}
    with cluster() as testbed:
        for kind in kinds:
            name = SHORT[kind]
            print(kind, file=sys.stderr, flush=True)
            recipe, overrides = KINDS[kind]
            started = time.monotonic()
            calm = f"{name}-calm"
            hpcft("submit", recipe, "-c", "testbed", *overrides, "-o", f"name={calm}", "--watch")
            calm_s = time.monotonic() - started
            total = current_step(folder_of(calm))
            started = time.monotonic()
            interruptions = interrupt(kind, name, total, testbed, random.Random(seed))
            figures[kind] = {
                "steps": total,
                "undisturbed_s": calm_s,
                "interrupted_s": time.monotonic() - started,
                "interruptions": [asdict(one) for one in interruptions],
                "same": compare(folder_of(name), folder_of(calm)),
            }
    return figures


@contextlib.contextmanager
def cluster() -> Iterator[Any]:
    """Starts a testbed, and makes a folder with the recipes the current one."""
    with tempfile.TemporaryDirectory(prefix="hpcft-tb-") as home, Testbed(Path(home)) as testbed:
        os.environ.update(testbed.env)
        work = Path(home, "work")
        work.mkdir()
        write_data(work)
        os.chdir(work)
        try:
            yield testbed
        finally:
            os.chdir("/")


ABOUT = """\
Made by `python benchmarks/interruptions/run.py`, on two cores that other work shared: nearly all of
the seconds are two to four processes that import PyTorch again. Checkpoints every 3 s. If a run
resumed from a later step than that of the fault, it had reached and saved that step before it
ended. Few-shot runs save each answer.
"""


def markdown(figures: dict[str, Any]) -> str:
    """Returns the report as a Markdown page."""
    lines = [
        "# Measured: the cost of an interruption",
        "",
        (__doc__ or "").split("\n\n")[1],
        "",
        ABOUT,
    ]
    for kind, one in figures.items():
        parts = ", ".join(f"{part} {'the same' if ok else 'NOT the same'}"
                          for part, ok in one["same"].items())  # fmt: skip
        lines += [
            f"## {kind}", "",
            f"{one['steps']:,} steps; undisturbed {one['undisturbed_s']:.0f} s, interrupted five "
            f"times {one['interrupted_s']:.0f} s. Bit by bit: {parts}.", "",
            "| fault | at step | resumed from | steps lost | seconds until the same step |",
            "|---|---:|---:|---:|---:|",
        ]  # fmt: skip
        lines += [
            f"| {i['fault'].replace('_', ' ')} | {i['step']} | {i['resumed_from']} | "
            f"{i['lost_steps']} | {i['lost_s']:.0f} |"
            for i in one["interruptions"]
        ]
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    """Measures the chosen kinds; returns 1 if a bit differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("kind", nargs="*", choices=[*SHORT.values(), []], help="default: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write all figures")
    parser.add_argument("--markdown", type=Path, help="write the report")
    options = parser.parse_args()
    files = [file and file.absolute() for file in (options.json, options.markdown)]
    chosen = [kind for kind, name in SHORT.items() if not options.kind or name in options.kind]
    figures = measure(chosen, options.seed)
    page = markdown(figures)
    for file, text in zip(files, (json.dumps(figures, indent=2), page), strict=True):
        if file:
            file.write_text(text + "\n")
    print(page)
    return int(not all(all(one["same"].values()) for one in figures.values()))


if __name__ == "__main__":
    sys.exit(main())
