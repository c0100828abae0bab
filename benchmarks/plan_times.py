"""Times `hpcft plan` with an empty cache and with cached traces, on one core, no GPU.

    python benchmarks/plan_times.py [--runs 5] [--markdown FILE]

Each plan is a fresh process, as a user starts it; the first one has an empty cache. Python's
compiled sources are there, as after an installation. The matrix of all recipes and profiles uses
all cores.
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
LARGE = str(ROOT / "docs" / "reference" / "scale" / "llama3_70b.yaml")

PAGE = """# Measured: planning times

Made by `python benchmarks/plan_times.py --markdown docs/reference/measured/plan_times.md`.

Seconds of `hpcft plan` in a fresh process, without a GPU or weights: the median of {runs} and, in
brackets, the range. First: with an empty cache. The single plans use one core. The bars are the
times that they may take.

{table}
CPU: {cpu}.
"""


@dataclass(frozen=True)
class Case:
    """A plan that is timed."""

    name: str
    """Name in the table."""
    arguments: list[str]
    """Arguments of `hpcft plan`."""
    first_bar_s: float
    """Seconds that it may take with an empty cache."""
    cached_bar_s: float | None
    """Seconds that it may take with a cache; None without a bar."""
    one_core: bool = True
    """Whether it is limited to one core."""


CASES = (
    Case("Llama-3-8B, full", ["llama3_8b_winogrande_full", "-c", "a100-80"], 5, 0.5),
    Case("Llama-3-8B, QLoRA", ["llama3_8b_winogrande_qlora", "-c", "a100-80"], 5, 0.5),
    Case("Gemma-7B, few-shot", ["gemma7b_fewshot", "-c", "a100-80"], 5, 0.5),
    Case("Llama-3-70B, full, 64 GPUs", [LARGE, "-c", "h100-80", "--scale", "64"], 5, 0.5),
    Case(f"{len(RECIPES)} recipes × all profiles", [*RECIPES, "--clusters", "all"], 60, None,
         one_core=False),
)  # fmt: skip


def run_once(case: Case, cache: str) -> float:
    """Returns the seconds that one process takes."""
    environment = {**os.environ, "XDG_CACHE_HOME": cache, "PYTHONDONTWRITEBYTECODE": ""}
    core = ["taskset", "-c", str(min(os.sched_getaffinity(0)))] if case.one_core else []
    begun = time.perf_counter()
    subprocess.run(
        [*core, sys.executable, "-m", "hpcft", "plan", *case.arguments],
        env=environment, stdout=subprocess.DEVNULL, check=True,
    )  # fmt: skip
    return time.perf_counter() - begun


def figures(seconds: list[float], bar_s: float | None) -> str:
    """Returns the median, the range, and the bar, as two cells of the table."""
    median = statistics.median(seconds)
    text = f"{median:.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
    if bar_s is None:
        return f"{text} | "
    return f"{text} | {bar_s:g}{'' if median <= bar_s else ' (missed)'}"


def main() -> None:
    """Times all cases, prints the table and writes the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    lines = ["| plan | first, s | bar | cached, s | bar |", "| --- | ---: | ---: | ---: | ---: |"]
    with tempfile.TemporaryDirectory() as folder:
        run_once(CASES[0], f"{folder}/compiled")  # compiles the sources
        for case in CASES:
            first, cached = [], []
            for run in range(options.runs):
                cache = f"{folder}/{CASES.index(case)}-{run}"
                first.append(run_once(case, cache))
                cached.append(run_once(case, cache))
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
