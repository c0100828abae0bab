"""The training of a rank as a process of its own, which holds the memory and the communicator."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

from hpcft.core.paths import RunPaths
from hpcft.training.distributed import gpu_memory
from hpcft.training.supervision.watchdog import Watchdog

# What it has to end by itself before it is killed.
END_S = 10.0
# What the kernel has to end it.
KILLED_S = 60.0
# What a scheduler says before it ends a job. The watchdog asks for stacks with SIGUSR1.
ENDING = (signal.SIGTERM, signal.SIGUSR2)


class WorkerProcess:
    """A training process and all that it starts: it leads a session of its own."""

    def __init__(
        self,
        paths: RunPaths,
        restart_index: int,
        watchdog: Watchdog,
        *,
        expandable_segments: bool = False,
    ) -> None:
        """Starts it.

        Args:
            paths: the run.
            restart_index: number of recoveries before it.
            watchdog: watches over it from now on.
            expandable_segments: whether its allocator may grow what it has reserved.
        """
        command = [sys.executable, "-u", "-m", "hpcft.training.worker", str(paths.folder)]
        numbers = (restart_index, os.getpid(), *watchdog.child_fds)
        self._process = subprocess.Popen(
            [*command, *map(str, numbers)],
            stdin=subprocess.DEVNULL,
            env=gpu_memory.with_expandable_segments()
            if expandable_segments and not gpu_memory.segments_expandable()
            else None,
            start_new_session=True,
            pass_fds=watchdog.child_fds,
            preexec_fn=_ignore_signals,  # until it has handlers of its own
        )
        self._watchdog = watchdog
        watchdog.watch(self._process.pid)

    def wait(self, timeout_s: float) -> int | None:
        """Its exit code; None when it has not ended within so long."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def signal(self, signum: int) -> None:
        """Sends a signal to it alone: its data workers would die of one."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signum)

    def end(self, *, at_once: bool) -> None:
        """Ends it with all that it has started.

        Args:
            at_once: whether it need not be asked first: what it holds is of no more use.

        Raises:
            TimeoutError: the kernel does not end it.
        """
        if not at_once:
            self.signal(signal.SIGTERM)
            self.wait(END_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._watchdog.close()
        if self.wait(KILLED_S) is None:
            raise TimeoutError(f"process {self._process.pid} cannot be killed: a disk hangs?")


def _ignore_signals() -> None:
    for signum in (*ENDING, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)
