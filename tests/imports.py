"""What a command imports, in a process of its own, as a user starts it."""

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
class Imported:
    """A command that has ended well."""

    cpu_s: float
    """Seconds of processor time until then."""

    modules: set[str]
    """What it had imported, submodules too."""

    after: list[str]
    """Lines that `then` has printed."""


def imported_by(*arguments: str, cwd: Path, then: str = "", **environment: str) -> Imported:
    """Runs a command of hpcft, and further Python in the same process."""
    done = subprocess.run(
        [sys.executable, "-c", COMMAND + then, *arguments], cwd=cwd, capture_output=True,
        text=True, env={**os.environ, **environment}, timeout=120, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("IMPORTED "))
    _, seconds, *modules = lines[at].split()
    return Imported(float(seconds), set(modules), lines[at + 1 :])
