"""Runs jobs as processes of this machine, through submitit's local controller."""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from hpcft.core.errors import ClusterError, UsageError
from hpcft.core.files import open_file, write_text
from hpcft.core.host import visible_gpus, wait_until
from hpcft.core.paths import cache_folder, log_file
from hpcft.core.records import Attempt
from hpcft.scheduler.job_environment import PYTHON_VARIABLES, without_session_job
from hpcft.scheduler.job_state import COMPLETED, NOT_QUEUED, UNKNOWN, JobState
from hpcft.scheduler.protocol import JobRequest, Submission
from hpcft.scheduler.sbatch import rank_command, runs_file, runs_text

CANCEL_TIMEOUT_S = 25.0
"""Seconds in which the controller may end its ranks before all are killed."""


class Local:
    """This machine as a scheduler: implements `hpcft.scheduler.protocol.Scheduler`.

    Each job is a controller process, which outlives the submitting command and starts the ranks.
    Jobs take turns: two at once would share the GPUs that each was planned to have alone.
    """

    def cluster_name(self) -> None:
        """Returns None: this machine is no cluster of Slurm."""

    def max_array_size(self) -> int:
        """Returns 1: each run is a job of its own."""
        return 1

    def script(self, request: JobRequest) -> None:
        """Returns None: there is no batch script."""

    def check(self, request: JobRequest) -> None:
        """Checks that this session may use as many GPUs as the plan has ranks.

        Raises:
            UsageError: CUDA_VISIBLE_DEVICES names fewer.
        """
        ranks = request.plan.layout.ranks_per_node
        visible = visible_gpus()
        if request.cluster.accelerator == "cuda" and visible is not None and len(visible) < ranks:
            raise UsageError(
                f"the run needs {ranks} GPUs of this machine, but CUDA_VISIBLE_DEVICES="
                f"{os.environ['CUDA_VISIBLE_DEVICES']} leaves {len(visible)}: unset it or name more"
            )

    def submit(self, request: JobRequest) -> list[Submission]:
        """Starts the controller of a run; returns its process id and start time."""
        command = rank_command(request, shlex.quote(sys.executable))
        cache_folder().mkdir(parents=True, exist_ok=True)
        write_text(runs_file(request), runs_text(request))
        pid = _spawn(request.logs, _controller_environment(request, command))
        return [Submission(pid, _process_started(int(pid)) or time.time())]

    def find_jobs(self, attempts: Sequence[Attempt]) -> list[str | None]:
        """Finds the controllers of attempts among the processes of this machine."""
        if not attempts:
            return []
        import psutil

        pids = {}
        for process in psutil.process_iter(["cmdline"]):
            command = process.info["cmdline"] or []
            if len(command) == 4 and command[2].endswith(".local_controller"):
                pids[command[3]] = str(process.pid)
        return [pids.get(attempt.logs) for attempt in attempts]

    def states(self, attempts: Sequence[Attempt]) -> list[JobState]:
        """Returns the state of each attempt; a dead controller leaves no outcome but the result."""
        return [_state(attempt) for attempt in attempts]

    def cancel(self, attempts: Sequence[Attempt]) -> list[bool | ClusterError]:
        """Ends the controllers of attempts and their ranks."""
        states = self.states(attempts)
        live = [
            attempt
            for attempt, state in zip(attempts, states, strict=True)
            if state.is_live and attempt.job_id
        ]
        for attempt in live:  # All at once: if one ended first, the next one would begin.
            _record_cancellation(attempt)
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(str(attempt.job_id)), signal.SIGINT)  # It ends its ranks first.
        for attempt in live:
            group = int(str(attempt.job_id))
            wait_until(partial(_has_ended, group), CANCEL_TIMEOUT_S, 0.05)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)  # The ranks are in the controller's session.
        return [
            ClusterError(f"job {attempt.job_id} runs on {attempt.host}: cancel it there")
            if state.state == UNKNOWN
            else state.is_live and attempt.job_id is not None
            for attempt, state in zip(attempts, states, strict=True)
        ]


# ---------------------------------------------------------------- the controller process


def queue_file() -> Path:
    """Returns the file that the controller of the running job locks, and writes its id into.

    It has the name of the machine: others may share the home, where their runs take turns too.
    """
    return cache_folder() / f"local-{os.uname().nodename}.lock"


def _controller_environment(request: JobRequest, command: str) -> dict[str, str]:
    """Returns the controller's environment: that of this process, the profile's, and submitit's."""
    ranks = request.plan.layout.ranks_per_node
    gpus = visible_gpus() or [str(index) for index in range(ranks)]
    visible = ",".join(gpus[:ranks])
    # An allocation that this session runs in ends the run, too.
    end = {name: os.environ[name] for name in ("SLURM_JOB_END_TIME",) if name in os.environ}
    return {
        **without_session_job(),
        **end,
        **PYTHON_VARIABLES,
        **request.cluster.environment,
        "SUBMITIT_LOCAL_NTASKS": str(ranks),
        "SUBMITIT_LOCAL_COMMAND": command,
        "SUBMITIT_LOCAL_TIMEOUT_S": str(request.plan.time_min * 60),
        "SUBMITIT_LOCAL_SIGNAL_DELAY_S": "30",
        "SUBMITIT_LOCAL_NODEID": "0",
        "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
        "SUBMITIT_STDERR_TO_STDOUT": "",
        "SUBMITIT_LOCAL_WITH_SHELL": "",
        "SUBMITIT_EXECUTOR": "local",
        "HPCFT_LOCAL_QUEUE": str(queue_file()),
        "CUDA_VISIBLE_DEVICES": visible if request.cluster.accelerator == "cuda" else "",
    }


def _spawn(logs: Path, environment: dict[str, str]) -> str:
    """Starts the controller; returns its process id. Not with Popen: no process waits for it."""
    # The controller outlives this process: a lock or a pipe of its caller must not live on in it.
    inherited = [int(name) for name in os.listdir("/dev/fd") if int(name) > 2]
    for descriptor in inherited:
        with contextlib.suppress(OSError):  # the listing's own is closed already
            os.set_inheritable(descriptor, False)
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", "hpcft.scheduler.local_controller", str(logs)],
        environment,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_RDWR, 0) for stream in (0, 1, 2)
        ],
        setsid=True,
        # A shell starts what is in its background with SIGINT ignored, by which we cancel.
        setsigmask=(),
        setsigdef=(signal.SIGINT, signal.SIGTERM, signal.SIGUSR2),
    )
    return str(pid)


def _cancellation(attempt: Attempt) -> Path:
    """Returns the file that says who has cancelled an attempt."""
    return Path(attempt.logs) / f"{attempt.job_id}_cancelled"


def _record_cancellation(attempt: Attempt) -> None:
    with contextlib.suppress(OSError):  # On a full disk the run has to end all the same.
        write_text(_cancellation(attempt), getpass.getuser())


def _cancelled_by(attempt: Attempt) -> str:
    """Returns who has cancelled an attempt, `by anna`; empty if nobody has."""
    try:
        with open_file(_cancellation(attempt)) as stream:
            return f"by {stream.read(100).decode(errors='replace')}"
    except OSError:
        return ""


# ---------------------------------------------------------------- states


def _state(attempt: Attempt) -> JobState:
    # The machine's own name, as in `attempts.new_attempt`: within a Slurm job Slurm's may differ.
    machine = os.uname().nodename
    if attempt.host != machine:
        return JobState(UNKNOWN, f"runs on {attempt.host}: look there")
    if attempt.job_id is None:
        return NOT_QUEUED
    started = _controller_started(attempt)
    if started is None:
        by = _cancelled_by(attempt)
        return JobState("CANCELLED" if by else COMPLETED, by, nodes=machine)
    if not log_file(Path(attempt.logs), str(attempt.job_id), 0, "out").exists():
        holder = _queue_holder()
        if holder is None or holder == int(attempt.job_id):
            return JobState("PENDING", "is starting")
        since = time.strftime("%H:%M on %d %b", time.localtime(_process_started(holder)))
        reason = f"waiting for another local run to end (process {holder}, since {since})"
        return JobState("PENDING", reason)
    return JobState("RUNNING", nodes=machine, elapsed_s=time.time() - started)


def _controller_started(attempt: Attempt) -> float | None:
    """Returns the Unix time at which the controller of an attempt started; None if it has ended."""
    if attempt.job_id is None or not attempt.job_id.isdecimal():
        return None
    started = _process_started(int(attempt.job_id))
    if started is None:
        return None
    if attempt.process_started is None:  # The submitting command was killed before it recorded it.
        return started if Local().find_jobs([attempt]) == [attempt.job_id] else None
    # Another start time means that another process has the id by now.
    return started if abs(started - attempt.process_started) <= 2 else None


def _process_started(pid: int) -> float | None:
    """Returns the Unix time at which a process started; None if it has ended, or is a zombie."""
    import psutil

    try:
        process = psutil.Process(pid)
        is_zombie = process.status() == psutil.STATUS_ZOMBIE
        return None if is_zombie else float(process.create_time())
    except (psutil.Error, OverflowError):  # No process id is that large.
        return None


def _has_ended(pid: int) -> bool:
    return _process_started(pid) is None


def _queue_holder() -> int | None:
    """Returns the process id of the controller whose turn it is; None if it is not known.

    A controller writes its id a moment after it has locked the file: until then the id is that of
    an earlier one, which has ended.
    """
    try:
        with queue_file().open(encoding="utf-8") as queue:
            try:
                fcntl.flock(queue, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = queue.read().strip()
                return int(pid) if pid.isdecimal() and _process_started(int(pid)) else None
    except OSError:
        pass  # No local run has ever started, or its file system has no locks.
    return None
