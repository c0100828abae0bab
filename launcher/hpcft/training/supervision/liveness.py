"""The pulse of one rank: how long it has been quiet, and how long it may be in what it does."""

from __future__ import annotations

import os
import statistics
import time
from collections import deque
from pathlib import Path

from hpcft.core.records import Cluster, Plan
from hpcft.training.distributed import worker_channel
from hpcft.training.distributed.worker_channel import STARTING, Heartbeat

# A step that takes so many times the longest one so far is not slow any more. The first ones start
# kernels and communicators, and are judged as the other phases are.
FACTOR = 5
WARM_UP_STEPS = 2
# Loading, scoring and saving do not beat often: they have so many times as long as a step has at
# least. With the profile's 8 minutes it is more than the 30 after which gloo gives up by itself.
PATIENCE = 4
# And disks may be so many times slower than the plan takes them to be.
SLOWER = 10
# These two wait for no other rank: what uses so much of a core is at work, though it cannot beat.
ALONE = (STARTING, "data")
BUSY_CORES = 0.02
BUSY_S = 10.0
# A debugger stops a process for a moment, and Slurm suspends ranks one after the other.
STOPPED_S = 10.0
# Between two looks nobody looked: this process was suspended itself, with the whole job.
AWAKE_S = 5.0
NEVER_S = 1e9


class LivenessMonitor:
    """Listens to the beats of one process. Its seconds are those that it was awake itself."""

    def __init__(self, cluster: Cluster, plan: Plan) -> None:
        """A pipe for a process that is started next.

        Args:
            cluster: says how long a rank may be quiet.
            plan: what the process runs.
        """
        self._least_s = 60 * cluster.stuck_after_min
        self._more_s = {"model": SLOWER * plan.loading_s, "saving": SLOWER * plan.saving_s}
        self._pipe, self.childs_pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._rest = ""
        self.beat = Heartbeat(time.monotonic(), STARTING, 0)
        self.phases = self.beats = self._steps = 0
        self._steps_s: deque[float] = deque(maxlen=100)
        self._longest_s = 0.0
        self._stepped_at = self._looked_at = self.beat.at
        self.now_s = self._beaten_s = 0.0
        self._stopped_s: float | None = None
        self._cpu = (0.0, 0.0)

    def close(self) -> None:
        """The process has ended."""
        os.close(self._pipe)

    def look(self, pid: int) -> None:
        """Takes the beats that have come, and how the process is."""
        now = time.monotonic()
        self.now_s += min(now - self._looked_at, AWAKE_S)
        self._looked_at = now
        self._listen()
        self._look_at(pid)

    @property
    def quiet_s(self) -> float:
        """Seconds since the last beat."""
        return self.now_s - self._beaten_s

    @property
    def limit_s(self) -> float:
        """How long the rank may be quiet in what it does now."""
        phase = self.beat.phase
        if phase == "done":
            return NEVER_S  # others may have more to do
        if phase == "training" and self._steps >= WARM_UP_STEPS:
            return max(self._least_s, FACTOR * self._longest_s)
        return PATIENCE * self._least_s + self._more_s.get(phase, 0.0)

    @property
    def is_stopped(self) -> bool:
        """Whether the process is stopped by a signal, and not only for a moment."""
        if self._stopped_s is None or self.beat.phase == "done":
            return False
        return self.now_s - self._stopped_s > STOPPED_S

    @property
    def step_s(self) -> float | None:
        """Median time of the latest steps; None before the first."""
        return statistics.median(self._steps_s) if self._steps_s else None

    def _listen(self) -> None:
        """Takes the beats that have come."""
        try:
            text = self._rest + os.read(self._pipe, 1 << 20).decode()
        except BlockingIOError:
            return
        *lines, self._rest = text.split("\n")
        for line in lines:
            self._take(worker_channel.read(line))

    def _take(self, beat: Heartbeat) -> None:
        before, self.beat = self.beat, beat
        if beat.phase != before.phase:
            self.phases, self.beats = self.phases + 1, 0
        elif beat.phase == "training":
            if self._steps >= WARM_UP_STEPS:
                quiet_s = min(beat.at - before.at, self.now_s - self._beaten_s)
                self._longest_s = max(self._longest_s, quiet_s)
            if beat.step != before.step:
                self._steps += 1
                self._steps_s.append(beat.at - self._stepped_at)
        if beat.step != before.step or beat.phase != before.phase:
            self._stepped_at = beat.at
        self.beats += 1
        self._beaten_s = self.now_s

    def _look_at(self, pid: int) -> None:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return  # it has ended
        state, *fields = stat.rpartition(")")[2].split()
        if state != "T":
            self._stopped_s = None
        elif self._stopped_s is None:
            self._stopped_s = self.now_s
        used_s = sum(map(int, fields[10:14])) / os.sysconf("SC_CLK_TCK")  # utime … cstime
        since_s, before_s = self._cpu
        if self.now_s - since_s > BUSY_S:
            busy = used_s - before_s > BUSY_CORES * (self.now_s - since_s)
            if busy and self.beat.phase in ALONE:
                self._beaten_s = self.now_s
            self._cpu = (self.now_s, used_s)
