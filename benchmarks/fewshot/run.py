"""Compares few-shot scoring with lm-eval's HF backend on a CPU: speed and peak memory.

    python benchmarks/fewshot/run.py [--cases 0 1 2 3 4] [--queries 200] [--peer-queries 8]
                                     [--repeats 2] [--markdown FILE]

Both sides get the same model in fp32, the same tokens, one thread, and run in turn, each time in a
new process. Neither's start nor its tokenising is counted; hpcft's pass over the shots is.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from cases import CASES

HERE = Path(__file__).parent
MAX_TOKENS = 768
"""Largest number of tokens of a batch of hpcft."""
TRIED_BATCHES, TRIED_QUERIES = (1, 4), 4
"""Batch sizes of lm-eval, and the number of queries to try each on; the faster one is used."""

PAGE = """# Measured: few-shot scoring against lm-eval

Made by `python benchmarks/fewshot/run.py {arguments}`. Random models in fp32; 8 shots of 200 tokens
that all prompts share, queries of 80 to 120 tokens, two labels; one thread. Each side ran {repeats}
times in turn, in processes of their own; the table shows the medians. lm-eval's HF backend
(`_loglikelihood_tokens`, start-up and tokenising left out, the better batch size of {tried} on
{tried_queries} queries) scored the first {peer_queries} queries, hpcft all {queries}, its pass over the shots counted. The ratio is that of
examples per second of CPU time; wall time is beside it. Memory is the peak resident set of the
whole process. The last column is the greatest difference of a log-likelihood.

{versions}

| model and labels | lm-eval, examples/s | hpcft, examples/s | ratio | ratio of wall time | bar | lm-eval, MiB | hpcft, MiB | difference |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{rows}

Arithmetic bounds the rows with one-token labels. With a vocabulary of 48k lm-eval multiplies 22 times as
often as hpcft in the model of 8 layers and 26 times in the wider one of 6 (matrix products of
1,720 tokens, output layer and causal attention, against those of a query, its attention to the
shots, and a 200th of the pass over them), and both run them at about the same speed.
"""  # noqa: E501


def run_side(name: str, case: int, queries: int, batch: int) -> dict[str, Any]:
    """Runs one side of one case in a process of its own; returns its figures."""
    command = [sys.executable, HERE / "side.py", name, case, queries, batch]
    done = subprocess.run(
        [str(part) for part in command], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def compare(case: int, queries: int, peer_queries: int, repeats: int) -> tuple[str, bool]:
    """Measures one case; returns its row of the table, and whether it reaches its bars."""
    batch = min(TRIED_BATCHES, key=lambda n: run_side("lm-eval", case, TRIED_QUERIES, n)["cpu_s"])
    ours, theirs = [], []
    for _ in range(repeats):
        theirs.append(run_side("lm-eval", case, peer_queries, batch))
        ours.append(run_side("hpcft", case, queries, MAX_TOKENS))
    # The peer scores the first queries only.
    rows = list(zip(ours[0]["log_likelihoods"], theirs[0]["log_likelihoods"], strict=False))
    pairs = [(a, b) for row, plain in rows for a, b in zip(row, plain, strict=True)]
    difference = max(abs(a - b) for a, b in pairs)
    same = all((row[0] > row[1]) == (plain[0] > plain[1]) for row, plain in rows)

    def speed(runs: list[dict[str, Any]], count: int, clock: str) -> float:
        return count / median(run[clock] for run in runs)

    fast, slow = speed(ours, queries, "cpu_s"), speed(theirs, peer_queries, "cpu_s")
    wall = speed(ours, queries, "wall_s") / speed(theirs, peer_queries, "wall_s")
    mine, peer = (max(run["peak_mib"] for run in runs) for runs in (ours, theirs))
    bar = CASES[case].bar
    holds = fast / slow >= bar and mine <= peer and difference <= 1e-4 and same
    missed = "" if holds else " (missed)"
    row = (
        f"| {CASES[case].name} | {slow:.2f} (batch {batch}) | {fast:.1f} | {fast / slow:.1f} | "
        f"{wall:.1f} | {bar:g}{missed} | {peer:,.0f} | {mine:,.0f} | {difference:.1e}"
        f"{'' if same else ', other choices'} |"
    )
    return row, holds


def versions() -> str:
    """Returns the compared versions, and the CPU."""
    names = ("lm-eval", "torch", "transformers")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    cpu = models[0] if models else platform.machine()
    return f"Versions: {', '.join(f'{name} {version(name)}' for name in names)}. CPU: {cpu}."


def main() -> int:
    """Measures all cases and prints the table; returns 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, nargs="*", default=[*range(len(CASES))])
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--peer-queries", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    rows, all_hold = [], True
    for case in options.cases:
        row, holds = compare(case, options.queries, options.peer_queries, options.repeats)
        print(row, "" if holds else "MISSED", flush=True)
        rows.append(row)
        all_hold &= holds
    if options.markdown:
        page = PAGE.format(
            arguments=" ".join(sys.argv[1:]), repeats=options.repeats, queries=options.queries,
            tried=" and ".join(map(str, TRIED_BATCHES)), tried_queries=TRIED_QUERIES,
            peer_queries=options.peer_queries, versions=versions(), rows="\n".join(rows),
        )  # fmt: skip
        options.markdown.write_text(page)
    return 0 if all_hold else 1


if __name__ == "__main__":
    sys.exit(main())
