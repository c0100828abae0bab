"""Finds out whether the kernel's out-of-memory killer has just killed a process of this node."""

from __future__ import annotations

import re
import time
from collections import deque
from pathlib import Path

INTERVAL_S = 1.0
# A killed process may take seconds to free its memory and end.
WINDOW_S = 15.0


class OomKillCounter:
    """Reads the kernel's counters of out-of-memory kills every second.

    It compares them over a short window only, so that an earlier kill does not count.
    """

    def __init__(self) -> None:
        self._files = find_counter_files()
        self._samples: deque[tuple[float, list[int]]] = deque()
        self.poll()

    def poll(self) -> None:
        """Reads the counters, at most once a second."""
        now = time.monotonic()
        if self._samples and now - self._samples[-1][0] < INTERVAL_S:
            return
        self._samples.append((now, self._read_counters()))
        while now - self._samples[0][0] > WINDOW_S:
            self._samples.popleft()

    def has_risen(self) -> bool:
        """Returns whether a counter is higher now than at the beginning of the window."""
        _, before = self._samples[0]
        pairs = zip(self._read_counters(), before, strict=True)
        return any(now > was for now, was in pairs)

    def _read_counters(self) -> list[int]:
        return [_read_counter(file) for file in self._files]


def find_counter_files(
    proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")
) -> list[Path]:
    """Returns the files that count kills: of this process's cgroup (v1 or v2), else of the node.

    A cgroup of version 2 counts the kills in all cgroups below it too.
    """
    files = []
    try:
        memberships = (proc / "self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        memberships = []
    for line in memberships:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            files.append(cgroups / group.lstrip("/") / "memory.events")
        elif "memory" in controllers.split(","):
            files.append(cgroups / "memory" / group.lstrip("/") / "memory.oom_control")
    return [file for file in files if _read_counter(file) >= 0] or [proc / "vmstat"]


def _read_counter(file: Path) -> int:
    """Returns the number of kills; -1 if the file has no such counter."""
    try:
        match = re.search(r"^oom_kill (\d+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return -1
    return int(match[1]) if match else -1
