"""Worker process: the training of a rank, in a process that holds its memory and communicators."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping

from hpcft.core.paths import RunPaths
from hpcft.training.distributed import gpu_memory
from hpcft.training.distributed.stop_signal import STOP_SIGNALS
from hpcft.training.supervision.watchdog import Watchdog
from hpcft.training.telemetry import job_start

# Time that a worker has to end after SIGTERM before it is killed.
END_S = 10.0
# Time that the kernel has to end a killed worker.
KILLED_S = 60.0


class WorkerProcess:
    """A worker and all processes that it starts; it leads a session of its own."""

    def __init__(
        self,
        paths: RunPaths,
        restart_index: int,
        watchdog: Watchdog,
        *,
        expandable_segments: bool = False,
    ) -> None:
        """Starts the worker.

        Args:
            paths: the run's files.
            restart_index: number of recoveries before this start.
            watchdog: watchdog that watches over the worker from now on.
            expandable_segments: whether its CUDA allocator uses expandable segments.
        """
        command = [sys.executable, "-u", "-m", "hpcft.training.worker", str(paths.folder)]
        numbers = (restart_index, os.getpid(), *watchdog.worker_fds)
        environment: Mapping[str, str] = os.environ
        if expandable_segments and not gpu_memory.segments_expandable():
            environment = gpu_memory.with_expandable_segments()
        self._process = subprocess.Popen(
            [*command, *map(str, numbers)],
            stdin=subprocess.DEVNULL,
            env={**environment, **job_start.worker_variable()},
            start_new_session=True,
            pass_fds=watchdog.worker_fds,
            preexec_fn=_ignore_signals,
        )
        self._watchdog = watchdog
        watchdog.watch(self._process.pid)

    def wait(self, timeout_s: float) -> int | None:
        """Waits for the worker to end; returns its exit code, or None at the timeout."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def signal(self, signum: int) -> None:
        """Sends a signal to the worker only: its data workers would end of it."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signum)

    def end(self, *, at_once: bool) -> None:
        """Ends the worker and all processes that it has started.

        Args:
            at_once: whether to kill it without SIGTERM before.

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
            raise TimeoutError(
                f"process {self._process.pid} cannot be killed; it may wait for a disk that hangs"
            )


def _ignore_signals() -> None:
    """Ignores stop signals until the worker has installed its own handlers."""
    for signum in (*STOP_SIGNALS, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)
