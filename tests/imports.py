"""Runs a command in a process of its own, and returns the modules that it has imported."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

COMMAND = """
import sys, time
from hpcft.cli.app import main
sys.argv = ["hpcft", *sys.argv[1:]]
try:
    main()
except SystemExit as ended:
    assert ended.code == 0, ended.code
sys.stdout.flush()
print("IMPORTED", time.process_time(), *sorted(sys.modules))
"""


@dataclass(frozen=True)
class ImportReport:
    """What a command that ended with success had used."""

    cpu_s: float
    """Seconds of processor time."""

    modules: set[str]
    """Names of the imported modules, with submodules."""

    after: list[str]
    """Lines that the further code has printed."""


def imported_by(*arguments: str, cwd: Path, then: str = "", **environment: str) -> ImportReport:
    """Runs a command of hpcft, and then further Python code in the same process."""
    done = subprocess.run(
        [sys.executable, "-c", COMMAND + then, *arguments], cwd=cwd, capture_output=True,
        text=True, env={**os.environ, **environment}, timeout=120, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    index = next(i for i, line in enumerate(lines) if line.startswith("IMPORTED "))
    _, seconds, *modules = lines[index].split()
    return ImportReport(float(seconds), set(modules), lines[index + 1 :])
