"""Runs one rank from start to end; if it fails, it writes why and keeps no other rank waiting.

Its supervisor starts it as `python -m hpcft.training.worker` with the arguments of `main`.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from hpcft.core.errors import HpcftError
from hpcft.core.paths import RunPaths
from hpcft.core.rank_errors import write_rank_error
from hpcft.core.records import Plan, RankError
from hpcft.recovery.log import FRAGMENTATION
from hpcft.recovery.run import Run
from hpcft.training.context import WorkerContext
from hpcft.training.distributed import gpu_memory, stop_signal, worker_channel
from hpcft.training.distributed.rank_env import RankInfo, init_rank_env
from hpcft.training.distributed.worker_channel import OUT_OF_MEMORY_EXIT, SAVED_EXIT

if TYPE_CHECKING:
    from hpcft.training.telemetry.progress import ProgressReporter

ELSEWHERE = (
    "a smaller batch would not help: take a GPU that nobody else uses (another node, an exclusive "
    "job), or plan with --other-processes"
)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(
    run_folder: str, restart_index: str, supervisor: str, heartbeat_fd: str, stacks_fd: str
) -> None:
    """Runs this process as one rank of a run.

    Args:
        run_folder: the run's folder.
        restart_index: number of recoveries before this start.
        supervisor: process id of the supervisor; this process ends with it.
        heartbeat_fd: pipe for heartbeats.
        stacks_fd: file for stacks.
    """
    stop_signal.install()
    _end_with(int(supervisor))
    heartbeats = worker_channel.connect(int(heartbeat_fd), int(stacks_fd))
    logging.basicConfig(stream=sys.stdout, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("hpcft").setLevel(logging.INFO)
    paths = RunPaths(Path(run_folder))
    rank: RankInfo | None = None
    reporter: ProgressReporter | None = None
    plan: Plan | None = None
    try:
        run = Run.open(paths.folder)
        plan = run.read_plan()
        rank = init_rank_env(plan)
        # Deprecations inside the libraries are for their developers, not for this log.
        warnings.filterwarnings("ignore", category=FutureWarning)
        # Imported here: the environment has to be set before torch and transformers are.
        from hpcft.training.modes import run_mode
        from hpcft.training.telemetry.progress import ProgressReporter

        reporter = ProgressReporter(paths, rank, int(restart_index), heartbeats)
        run_mode(WorkerContext(run, plan, reporter, int(restart_index)))
    except stop_signal.StoppedAfterSave:
        sys.stdout.flush()
        os._exit(SAVED_EXIT)
    except BaseException as error:
        # Frames hold tensors: what is left to do needs a little of their memory.
        traceback.clear_frames(error.__traceback__)
        phase = reporter.progress.phase if reporter else "starting"
        code = _write_error(paths, rank, plan, error, phase)
        # An ordinary exit would wait for threads of a communicator whose peers are gone.
        os._exit(code)
    sys.stdout.flush()


def _end_with(supervisor: int) -> None:
    """Lets the kernel end this process with its supervisor, however that one ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor:
        os._exit(1)  # it was gone before


def _write_error(
    paths: RunPaths, rank: RankInfo | None, plan: Plan | None, error: BaseException, phase: str
) -> int:
    """Writes why this rank ends; returns the exit code to end with."""
    short = gpu_memory.out_of_memory_of(error, plan) if plan else None
    answerable = bool(plan and short and gpu_memory.can_fall_back(short, plan))
    # While a fallback may help, the error log stays silent: it is no failure yet.
    traceback.print_exception(error, file=sys.stdout if answerable else sys.stderr)
    message, failure, next_step = str(error) or type(error).__name__, "", ""
    if short:
        message = short.foreign or short.evidence
        if short.foreign:
            failure, next_step = "foreign_memory", ELSEWHERE
        elif short.fragmented and not gpu_memory.segments_expandable():
            failure = FRAGMENTATION
    record = RankError.now(
        rank.rank if rank else int(os.environ.get("SLURM_PROCID", "0")),
        "DataError" if isinstance(error, HpcftError) else type(error).__name__,
        message[:20_000],
        job_id=rank.job_id if rank else "",
        phase=phase,
        failure=failure,
        next_step=next_step,
        traceback="".join(traceback.format_exception(error))[-20_000:],
    )
    write_rank_error(paths, record)
    sys.stdout.flush()
    sys.stderr.flush()
    return OUT_OF_MEMORY_EXIT if answerable else 1


if __name__ == "__main__":
    main(*sys.argv[1:])
