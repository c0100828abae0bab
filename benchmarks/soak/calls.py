"""Counts the calls of scheduler commands, with programs of the same names first on PATH."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

COMMANDS = ("sbatch", "squeue", "sacct", "scontrol", "scancel", "sinfo")
WINDOW_S = 60.0

SCRIPT = """#!/bin/sh
echo "$(date +%s.%N) {name}" >> '{log}'
exec '{program}' "$@"
"""


class CallCounter:
    """Scheduler commands that log each call."""

    def __init__(self, folder: Path) -> None:
        """Writes the programs into a new folder.

        Args:
            folder: folder to create, and to put first on PATH.
        """
        folder.mkdir()
        self.folder = folder
        self.log = folder / "calls.log"
        self.log.touch()
        for name in COMMANDS:
            program = shutil.which(name)
            if program is None:
                raise SystemExit(f"{name} is not on PATH")
            file = folder / name
            file.write_text(SCRIPT.format(name=name, log=self.log, program=program))
            file.chmod(0o755)

    def figures(self) -> dict[str, float]:
        """Returns the calls of each command, per minute on average, and the most in a minute."""
        calls = [line.split() for line in self.log.read_text().splitlines()]
        times = sorted(float(at) for at, _ in calls)
        counts = Counter(name for _, name in calls)
        minutes = max((times[-1] - times[0]) / 60, 1.0) if times else 1.0
        return {
            **counts,
            "per_minute": len(times) / minutes,
            "most_per_minute": _most_in_a_window(times),
        }


def _most_in_a_window(times: list[float]) -> int:
    """Returns the largest number of times within one window; the times are sorted."""
    most = first = 0
    for last, at in enumerate(times):
        while at - times[first] > WINDOW_S:
            first += 1
        most = max(most, last - first + 1)
    return most
