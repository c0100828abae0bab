"""Whether the kernel has killed a process of this node for lack of memory a moment ago."""

from __future__ import annotations

import re
import time
from collections import deque
from pathlib import Path

INTERVAL_S = 1.0
# A process that is killed may take seconds to give its memory back and be gone.
WINDOW_S = 15.0


class OomKillCounter:
    """Counters of the kernel's out-of-memory killer, read every second.

    Looked at over a short window only, so that a kill of long ago is not taken for the latest.
    """

    def __init__(self) -> None:
        self._counters = counters()
        self._seen: deque[tuple[float, list[int]]] = deque()
        self.look()

    def look(self) -> None:
        """Reads the counters; call it often, it does so once a second."""
        now = time.monotonic()
        if self._seen and now - self._seen[-1][0] < INTERVAL_S:
            return
        self._seen.append((now, self._read()))
        while now - self._seen[0][0] > WINDOW_S:
            self._seen.popleft()

    def rose(self) -> bool:
        """Whether a counter is higher now than at the beginning of the window."""
        return any(now > was for now, was in zip(self._read(), self._seen[0][1], strict=True))

    def _read(self) -> list[int]:
        return [_count(file) for file in self._counters]


def counters(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> list[Path]:
    """Files that count kills: of this process's cgroup (either version), else of the node.

    In a cgroup of version 2 the count holds for all groups below it too.
    """
    found = []
    try:
        memberships = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        memberships = []
    for line in memberships:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            found.append(cgroups / group.lstrip("/") / "memory.events")
        elif "memory" in controllers.split(","):
            found.append(cgroups / "memory" / group.lstrip("/") / "memory.oom_control")
    return [file for file in found if _count(file) >= 0] or [proc / "vmstat"]


def _count(file: Path) -> int:
    try:
        match = re.search(r"^oom_kill (\d+)$", file.read_text(), re.MULTILINE)
    except OSError:
        return -1
    return int(match[1]) if match else -1
