"""Compares the time of `hpcft --help` with importing Typer and rich; the limit is a ratio of 1.5.

    python benchmarks/cli_start.py [--runs 15]

Each run is a new process. The two commands alternate, so that other load of the machine slows both
alike. The result is the ratio of the medians.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

MAX_RATIO = 1.5
COMMANDS = {
    "import typer, rich": [sys.executable, "-c", "import typer, rich"],
    "hpcft --help": [sys.executable, "-m", "hpcft", "--help"],
}


def main() -> None:
    """Times both commands and prints their medians and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(runs):
        for name, command in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - started)
    medians = [statistics.median(times) for times in seconds.values()]
    for name, times in seconds.items():
        print(f"{name:20} median {statistics.median(times):.3f} s, minimum {min(times):.3f} s")
    print(f"ratio {medians[1] / medians[0]:.2f} (limit {MAX_RATIO})")


if __name__ == "__main__":
    main()
