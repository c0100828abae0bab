"""Liveness of one worker: how long it has been quiet, and how long it may be in its phase."""

from __future__ import annotations

import os
import statistics
import time
from collections import deque
from pathlib import Path

from hpcft.core.records import Cluster, Plan
from hpcft.training.distributed.worker_channel import STARTING, Heartbeat, parse_heartbeat

# A rank hangs if a step takes this many times its longest step so far. The first steps load kernels
# and set up communicators, so they get the time limit of the other phases.
STEP_FACTOR = 5
WARM_UP_STEPS = 2
# Loading, scoring and saving send few heartbeats: they may take this many times the profile's
# `stuck_after_min`. With its default of 8 minutes that is more than gloo's own timeout of 30.
PHASE_FACTOR = 4
# Loading and saving get extra time, because disks may be this many times slower than planned.
DISK_FACTOR = 10
# In these phases a rank waits for no other rank: if it uses this part of a core, it is at work,
# even if it sends no heartbeats.
PHASES_ALONE = (STARTING, "data")
BUSY_CORES = 0.02
BUSY_S = 10.0
# A debugger may stop a process for a moment, and Slurm suspends the ranks of a job one by one.
STOPPED_S = 10.0
# A longer pause between two polls means that this process was suspended itself, with the whole job.
AWAKE_S = 5.0
NEVER_S = 1e9


class LivenessMonitor:
    """Receives the heartbeats of one worker.

    Its clock counts only the seconds during which this process itself was awake.
    """

    def __init__(self, cluster: Cluster, plan: Plan) -> None:
        """Opens the pipe of a worker that is started next.

        Args:
            cluster: profile with the time that a rank may be quiet.
            plan: plan that the worker runs.
        """
        self._min_limit_s = 60 * cluster.stuck_after_min
        self._extra_s = {
            "model": DISK_FACTOR * plan.loading_s,
            "saving": DISK_FACTOR * plan.saving_s,
        }
        self._pipe, self.worker_pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._partial_line = ""
        self.heartbeat = Heartbeat(time.monotonic(), STARTING, 0)
        self.phases = self.heartbeats = self._steps = 0
        self._steps_s: deque[float] = deque(maxlen=100)
        self._longest_s = 0.0
        self._stepped_at = self._polled_at = self.heartbeat.at
        self.now_s = self._last_heartbeat_s = 0.0
        self._stopped_s: float | None = None
        self._cpu = (0.0, 0.0)

    def close(self) -> None:
        """Closes the pipe after the worker has ended."""
        os.close(self._pipe)

    def poll(self, pid: int) -> None:
        """Receives new heartbeats, and reads the worker's state and CPU time from /proc."""
        now = time.monotonic()
        self.now_s += min(now - self._polled_at, AWAKE_S)
        self._polled_at = now
        self._read_pipe()
        self._read_proc(pid)

    @property
    def quiet_s(self) -> float:
        """Seconds since the last heartbeat."""
        return self.now_s - self._last_heartbeat_s

    @property
    def limit_s(self) -> float:
        """Seconds that the worker may be quiet in its current phase."""
        phase = self.heartbeat.phase
        if phase == "done":
            return NEVER_S  # Other ranks may have more to do.
        if phase == "training" and self._steps >= WARM_UP_STEPS:
            return max(self._min_limit_s, STEP_FACTOR * self._longest_s)
        return PHASE_FACTOR * self._min_limit_s + self._extra_s.get(phase, 0.0)

    @property
    def is_stopped(self) -> bool:
        """Whether the worker has been stopped by a signal for more than a moment."""
        if self._stopped_s is None or self.heartbeat.phase == "done":
            return False
        return self.now_s - self._stopped_s > STOPPED_S

    @property
    def step_s(self) -> float | None:
        """Median seconds of the latest steps; None before the first."""
        return statistics.median(self._steps_s) if self._steps_s else None

    def _read_pipe(self) -> None:
        try:
            text = self._partial_line + os.read(self._pipe, 1 << 20).decode()
        except BlockingIOError:
            return
        *lines, self._partial_line = text.split("\n")
        for line in lines:
            self._receive(parse_heartbeat(line))

    def _receive(self, heartbeat: Heartbeat) -> None:
        before, self.heartbeat = self.heartbeat, heartbeat
        if heartbeat.phase != before.phase:
            self.phases, self.heartbeats = self.phases + 1, 0
        elif heartbeat.phase == "training":
            if self._steps >= WARM_UP_STEPS:
                quiet_s = min(heartbeat.at - before.at, self.now_s - self._last_heartbeat_s)
                self._longest_s = max(self._longest_s, quiet_s)
            if heartbeat.step != before.step:
                self._steps += 1
                self._steps_s.append(heartbeat.at - self._stepped_at)
        if heartbeat.step != before.step or heartbeat.phase != before.phase:
            self._stepped_at = heartbeat.at
        self.heartbeats += 1
        self._last_heartbeat_s = self.now_s

    def _read_proc(self, pid: int) -> None:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
        except OSError:
            return  # The worker has ended.
        state, *fields = stat.rpartition(")")[2].split()
        if state != "T":
            self._stopped_s = None
        elif self._stopped_s is None:
            self._stopped_s = self.now_s
        used_s = sum(map(int, fields[10:14])) / os.sysconf("SC_CLK_TCK")  # utime … cstime
        since_s, used_before_s = self._cpu
        if self.now_s - since_s > BUSY_S:
            is_busy = used_s - used_before_s > BUSY_CORES * (self.now_s - since_s)
            if is_busy and self.heartbeat.phase in PHASES_ALONE:
                self._last_heartbeat_s = self.now_s
            self._cpu = (self.now_s, used_s)
