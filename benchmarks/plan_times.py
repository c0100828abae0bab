"""How long a plan takes, at first and once its traces are cached, on one core without a GPU.

    python benchmarks/plan_times.py [--runs 5] [--markdown FILE]

Each is a fresh process, as a user starts it; the first plan has an empty cache. Python's compiled
sources are there, as after an installation. The matrix of all recipes and profiles has all cores.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
RECIPES = sorted(str(path) for path in (ROOT / "recipes").glob("*.yaml"))
LARGE = str(ROOT / "docs" / "scale" / "llama3_70b.yaml")

PAGE = """# How long a plan takes

Made by `python benchmarks/plan_times.py --markdown docs/plan_times.md`: `hpcft plan` in a fresh
process, no GPU, no weights; the middle of {runs} and, in brackets, the least and the most. First:
with an empty cache. The single plans have one core.

{table}
CPU: {cpu}.
"""


@dataclass(frozen=True)
class Case:
    """A plan that is timed."""

    name: str
    arguments: list[str]
    first_bar_s: float
    cached_bar_s: float | None
    one_core: bool = True


CASES = (
    Case("Llama-3-8B, full", ["llama3_8b_winogrande_full", "-c", "a100-80"], 5, 0.5),
    Case("Llama-3-8B, QLoRA", ["llama3_8b_winogrande_qlora", "-c", "a100-80"], 5, 0.5),
    Case("Gemma-7B, few-shot", ["gemma7b_fewshot", "-c", "a100-80"], 5, 0.5),
    Case("Llama-3-70B, full, 64 GPUs", [LARGE, "-c", "h100-80", "--scale", "64"], 5, 0.5),
    Case(f"{len(RECIPES)} recipes × all profiles", [*RECIPES, "--clusters", "all"], 60, None,
         one_core=False),
)  # fmt: skip


def timed(case: Case, cache: str) -> float:
    """Seconds of one process."""
    environment = {**os.environ, "XDG_CACHE_HOME": cache, "PYTHONDONTWRITEBYTECODE": ""}
    core = ["taskset", "-c", str(min(os.sched_getaffinity(0)))] if case.one_core else []
    begun = time.perf_counter()
    subprocess.run(
        [*core, sys.executable, "-m", "hpcft", "plan", *case.arguments],
        env=environment, stdout=subprocess.DEVNULL, check=True,
    )  # fmt: skip
    return time.perf_counter() - begun


def figures(seconds: list[float], bar_s: float | None) -> str:
    """The middle, the range, and whether the bar holds."""
    middle = statistics.median(seconds)
    said = f"{middle:.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
    if bar_s is None:
        return f"{said} | "
    return f"{said} | {bar_s:g}{'' if middle <= bar_s else ' (missed)'}"


def main() -> None:
    """Times all and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    lines = ["| plan | first, s | bar | cached, s | bar |", "| --- | ---: | ---: | ---: | ---: |"]
    with tempfile.TemporaryDirectory() as folder:
        timed(CASES[0], f"{folder}/compiled")  # sources are compiled once
        for case in CASES:
            first, cached = [], []
            for run in range(options.runs):
                cache = f"{folder}/{CASES.index(case)}-{run}"
                first.append(timed(case, cache))
                cached.append(timed(case, cache))
            lines.append(
                f"| {case.name} | {figures(first, case.first_bar_s)} | "
                f"{figures(cached, case.cached_bar_s)} |"
            )
            print(lines[-1], flush=True)
    if options.markdown:
        models = [
            line.partition(": ")[2]
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        options.markdown.write_text(
            PAGE.format(
                runs=options.runs, table="\n".join(lines) + "\n", cpu=models[0] if models else "?"
            )
        )


if __name__ == "__main__":
    main()
