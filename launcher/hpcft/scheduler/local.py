"""This machine as a cluster of one node, through submitit's local executor."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from hpcft.core.paths import cache_folder, log_file
from hpcft.core.records import Attempt, Cluster, Plan
from hpcft.scheduler.job_state import COMPLETED, JobState


def submit(folder: Path, cluster: Cluster, plan: Plan, entry: Any, run: Path) -> tuple[str, float]:
    """Starts the ranks of a run under a controller that outlives this process.

    Returns:
        The controller's process id as job id, and the time at which it started.
    """
    from submitit.local.local import LocalExecutor, LocalJob

    ranks = plan.layout.ranks_per_node

    class Detached(LocalExecutor):  # type: ignore[misc]
        """Starts our controller in a session of its own, so that Ctrl-C here does not reach it."""

        def _submit_command(self, command: str) -> Any:
            visible = ",".join(str(index) for index in range(ranks))
            environment = {
                **os.environ,
                **cluster.environment,
                "SUBMITIT_LOCAL_NTASKS": str(ranks),
                "SUBMITIT_LOCAL_COMMAND": command,
                "SUBMITIT_LOCAL_TIMEOUT_S": str(plan.time_min * 60),
                "SUBMITIT_LOCAL_SIGNAL_DELAY_S": "30",
                "SUBMITIT_LOCAL_NODEID": "0",
                "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
                "SUBMITIT_STDERR_TO_STDOUT": "",
                "SUBMITIT_LOCAL_WITH_SHELL": "",
                "SUBMITIT_EXECUTOR": "local",
                "HPCFT_LOCAL_QUEUE": str(cache_folder() / "local.lock"),
                "CUDA_VISIBLE_DEVICES": visible if cluster.accelerator == "cuda" else "",
            }
            # Not Popen: nobody here will ever wait for the controller.
            pid = os.posix_spawn(
                sys.executable,
                [sys.executable, "-m", "hpcft.scheduler.local_controller", str(self.folder)],
                environment,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_RDWR, 0) for stream in (0, 1, 2)
                ],
                setsid=True,
            )
            return LocalJob(self.folder, str(pid), list(range(ranks)))

    cache_folder().mkdir(parents=True, exist_ok=True)
    executor = Detached(folder=folder)
    executor.update_parameters(tasks_per_node=ranks, timeout_min=plan.time_min)
    job = executor.submit(entry, str(run))
    return job.job_id, _started(int(job.job_id)) or time.time()


def _started(pid: int) -> float | None:
    """Unix time at which a live process started; None if there is none (or only a zombie)."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except (psutil.Error, OverflowError):  # no process id is that large
        return None


def state(attempt: Attempt) -> JobState:
    """Whether the controller still lives; that it is gone tells no outcome."""
    if attempt.host != os.uname().nodename:
        return JobState("UNKNOWN", f"runs on {attempt.host}: ask there")
    if attempt.job_id is None or not attempt.job_id.isdecimal():
        return JobState("FAILED", "was not started: the submitting command was interrupted")
    started = _started(int(attempt.job_id))
    expected = attempt.process_started
    if started is None or expected is None or abs(started - expected) > 2:
        return JobState(COMPLETED, "", attempt.host)
    if not log_file(Path(attempt.logs), attempt.job_id, 0, "out").exists():
        return JobState("PENDING", "waiting for another local run to end")
    return JobState("RUNNING", "", attempt.host, time.time() - started)


def cancel(attempt: Attempt) -> bool:
    """Ends the controller and its ranks; whether it was alive."""
    if not state(attempt).is_live or attempt.job_id is None:
        return False
    group = int(attempt.job_id)
    os.kill(group, signal.SIGINT)  # the controller ends its ranks on the way out
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _started(group) is not None:
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)  # it led a session of its own, with all its ranks
    return True
