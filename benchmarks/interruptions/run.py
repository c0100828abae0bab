"""Interrupts runs five times each, compares them with undisturbed ones, and says what it cost.

A run of each kind is interrupted at five random steps by five different causes on a real Slurm, and
left to itself. Its weights, answers and metrics have to be those of a run that nothing disturbed,
bit by bit.

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
for place in ("tests", "tests/faults", "slurm/testbed"):
    sys.path.insert(0, str(ROOT / place))

from interrupting import FAULTS, met  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402
from test_slurm_runs import QLORA  # noqa: E402

from builders import llama_folder  # noqa: E402
from conftest import ASKED, RECIPE, film_rows, write_rows  # noqa: E402
from hpcft.training.modes import answer_log  # noqa: E402
from real_runs import current_step, folder_of, losses, until  # noqa: E402
from testbed import Testbed  # noqa: E402

# Periodic checkpoints every few seconds: a run of hours has them every half hour.
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
    """One interruption, and what it cost."""

    cause: str
    """A function of `tests/faults/interrupting.py`."""
    current_step: int
    """Step that the run had reached."""
    went_on_from: int = 0
    """Step that it went on from."""
    lost_steps: int = 0
    """Steps that were done twice."""
    lost_s: float = 0.0
    """Seconds until it was where it had been."""


def data(folder: Path) -> None:
    """Recipes and rows of the three kinds."""
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
    """What a command prints; it must not fail."""
    command = [sys.executable, "-m", "hpcft", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        raise SystemExit(f"{command}: {done.stderr}")
    return done.stdout


def interrupted(kind: str, name: str, total: int, testbed: Any, dice: random.Random) -> list[Any]:
    """Submits a run and interrupts it five times; what each time cost."""
    recipe, overrides = KINDS[kind]
    hpcft("submit", recipe, "-c", "testbed", *overrides, "-o", f"name={name}")
    folder = folder_of(name)
    causes = dice.sample(sorted(FAULTS), 5)
    steps = sorted(dice.sample(range(total // 20, total * 9 // 10), 5))
    found = []
    for cause, at in zip(causes, steps, strict=True):
        until(lambda at=at: current_step(folder) >= at, 300.0, f"{name}: step {at}")
        before, reached, begun = len(met(name)), current_step(folder), time.monotonic()
        FAULTS[cause](name, testbed)
        until(lambda before=before: len(met(name)) > before, 120.0, f"{name}: {cause}")
        until(lambda reached=reached: current_step(folder) > reached and training(folder), 300.0, cause)
        from_step = met(name)[before].step
        lost_s = time.monotonic() - begun
        found.append(Interruption(cause, reached, from_step, max(reached - from_step, 0), lost_s))
        print(f"  {found[-1]}", file=sys.stderr, flush=True)
    hpcft("status", name, "--watch")
    return found


def training(folder: Path) -> bool:
    """Whether the heartbeat is of a run that does steps."""
    return json.loads((folder / "progress.json").read_text())["phase"] != "starting"


def same(one: Path, other: Path) -> dict[str, bool]:
    """What of two run folders is the same, bit by bit."""
    records = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    found = {"metrics": records[0]["metrics"] == records[1]["metrics"]}
    if (one / "model").exists():
        weights = [[load_file(file) for file in sorted((folder / "model").glob("*.safetensors"))]
                   for folder in (one, other)]  # fmt: skip
        found["weights"] = bool(weights[0]) and all(
            a.keys() == b.keys() and all((a[key] == b[key]).all() for key in a)
            for a, b in zip(*weights, strict=True)
        )
        found["losses"] = losses(one) == losses(other)
    else:
        said = [answer_log.read_answers(folder / "answers") for folder in (one, other)]
        found["answers"] = bool(said[0]) and said[0] == said[1]
    return found


def report(kinds: list[str], seed: int) -> dict[str, Any]:
    """All kinds, on a cluster of its own."""
    found: dict[str, Any] = {}
    with cluster() as testbed:
        for kind in kinds:
            name = SHORT[kind]
            print(kind, file=sys.stderr, flush=True)
            recipe, overrides = KINDS[kind]
            begun = time.monotonic()
            calm = f"{name}-calm"
            hpcft("submit", recipe, "-c", "testbed", *overrides, "-o", f"name={calm}", "--watch")
            calm_s = time.monotonic() - begun
            total = current_step(folder_of(calm))
            begun = time.monotonic()
            met_with = interrupted(kind, name, total, testbed, random.Random(seed))
            found[kind] = {
                "steps": total,
                "undisturbed_s": calm_s,
                "interrupted_s": time.monotonic() - begun,
                "interruptions": [asdict(one) for one in met_with],
                "same": same(folder_of(name), folder_of(calm)),
            }
    return found


@contextlib.contextmanager
def cluster() -> Iterator[Any]:
    """A testbed, and a folder with the recipes that is the current one."""
    with tempfile.TemporaryDirectory(prefix="hpcft-tb-") as home, Testbed(Path(home)) as testbed:
        os.environ.update(testbed.env)
        work = Path(home, "work")
        work.mkdir()
        data(work)
        os.chdir(work)
        try:
            yield testbed
        finally:
            os.chdir("/")


ABOUT = """\
Made by `python benchmarks/interruptions/run.py`, on two cores that other work shared: nearly all of
the seconds are two to four processes that import PyTorch again. Checkpoints every 3 s; where a step
that a run went on from lies beyond the one at which the fault came, it had come that far before it
ended. Few-shot runs save each answer.
"""


def markdown(found: dict[str, Any]) -> str:
    """The report as a page."""
    lines = ["# What an interruption costs", "", (__doc__ or "").split("\n\n")[1], "", ABOUT]
    for kind, one in found.items():
        alike = ", ".join(f"{what} {'the same' if ok else 'NOT the same'}"
                          for what, ok in one["same"].items())  # fmt: skip
        lines += [
            f"## {kind}", "",
            f"{one['steps']:,} steps; undisturbed {one['undisturbed_s']:.0f} s, interrupted five "
            f"times {one['interrupted_s']:.0f} s. Bit by bit: {alike}.", "",
            "| cause | at step | went on from | steps lost | seconds until it was there again |",
            "|---|---:|---:|---:|---:|",
        ]  # fmt: skip
        lines += [
            f"| {i['cause'].replace('_', ' ')} | {i['step']} | {i['went_on_from']} | "
            f"{i['lost_steps']} | {i['lost_s']:.0f} |"
            for i in one["interruptions"]
        ]
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    """Runs the kinds that were asked for; 1 where a bit differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("kind", nargs="*", choices=[*SHORT.values(), []], help="default: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write all figures")
    parser.add_argument("--markdown", type=Path, help="write the report")
    options = parser.parse_args()
    files = [file and file.absolute() for file in (options.json, options.markdown)]
    chosen = [kind for kind, name in SHORT.items() if not options.kind or name in options.kind]
    found = report(chosen, options.seed)
    page = markdown(found)
    for file, text in zip(files, (json.dumps(found, indent=2), page), strict=True):
        if file:
            file.write_text(text + "\n")
    print(page)
    return int(not all(all(one["same"].values()) for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
