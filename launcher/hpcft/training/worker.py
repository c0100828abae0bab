"""Worker: runs the training of one rank; if it fails, it writes why and ends at once.

The rank's supervisor starts it as `python -m hpcft.training.worker`, with the arguments of `main`.
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
from hpcft.core.files import check_private
from hpcft.core.paths import RunPaths
from hpcft.core.rank_errors import write_rank_error
from hpcft.core.records import Plan, RankError
from hpcft.recovery.log import FRAGMENTATION
from hpcft.recovery.run import Run
from hpcft.training.checkpointing import nvme_offload
from hpcft.training.context import WorkerContext
from hpcft.training.distributed import gpu_memory, stop_signal, worker_channel
from hpcft.training.distributed.rank_env import RankInfo, check_gpu, init_rank_env
from hpcft.training.distributed.worker_channel import OUT_OF_MEMORY_EXIT, SAVED_EXIT

if TYPE_CHECKING:
    from hpcft.training.telemetry.progress import ProgressReporter

FOREIGN_MEMORY_ADVICE = (
    "a smaller batch would not help: use a GPU that nobody else uses (another node, an exclusive "
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
        heartbeat_fd: descriptor of the pipe for heartbeats.
        stacks_fd: descriptor of the file for stacks.
    """
    stop_signal.install()
    _end_with(int(supervisor))
    heartbeats = worker_channel.connect(int(heartbeat_fd), int(stacks_fd))
    logging.basicConfig(stream=sys.stdout, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("hpcft").setLevel(logging.INFO)
    paths = RunPaths(Path(run_folder))
    check_private(paths.folder)
    rank: RankInfo | None = None
    reporter: ProgressReporter | None = None
    plan: Plan | None = None
    planned_bytes: int | None = None
    try:
        run = Run.open(paths.folder)
        plan, planned_bytes = run.read_plan(), run.read_planned_bytes()
        rank = init_rank_env(plan)
        check_gpu(plan)
        plan = nvme_offload.with_own_folder(plan, paths, run.cluster, rank, int(restart_index))
        # Deprecation warnings of the libraries would only fill this log.
        warnings.filterwarnings("ignore", category=FutureWarning)
        # Imported here, because they import torch and transformers, which read the environment.
        from hpcft.training.modes import run_mode
        from hpcft.training.telemetry.progress import ProgressReporter

        reporter = ProgressReporter(paths, rank, int(restart_index), heartbeats)
        run_mode(
            WorkerContext(run, plan, reporter, int(restart_index), planned_bytes=planned_bytes)
        )
    except stop_signal.StoppedAfterSave:
        sys.stdout.flush()
        os._exit(SAVED_EXIT)
    except BaseException as error:
        # The frames hold tensors, and writing the error needs a little of their memory.
        traceback.clear_frames(error.__traceback__)
        phase = reporter.progress.phase if reporter else "starting"
        code = _write_error(
            paths, error, rank=rank, plan=plan, planned_bytes=planned_bytes, phase=phase
        )
        # A normal exit would wait for threads of a communicator whose peers are gone.
        os._exit(code)
    sys.stdout.flush()


def _end_with(supervisor: int) -> None:
    """Lets the kernel end this process with its supervisor, however that one ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor:
        os._exit(1)  # The supervisor had ended before.


def _write_error(
    paths: RunPaths,
    error: BaseException,
    *,
    rank: RankInfo | None,
    plan: Plan | None,
    planned_bytes: int | None,
    phase: str,
) -> int:
    """Writes why this rank ends; returns the exit code to end with."""
    shortage = gpu_memory.out_of_memory_of(error, plan, planned_bytes) if plan else None
    may_fall_back = bool(plan and shortage and gpu_memory.can_fall_back(shortage, plan))
    # As long as a fallback may help, the run has not failed, and its error log stays empty.
    traceback.print_exception(error, file=sys.stdout if may_fall_back else sys.stderr)
    message, failure, next_step = str(error) or type(error).__name__, "", ""
    if shortage:
        message = shortage.foreign or shortage.evidence
        if shortage.foreign:
            failure, next_step = "foreign_memory", FOREIGN_MEMORY_ADVICE
        elif shortage.fragmented and not gpu_memory.segments_expandable():
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
    return OUT_OF_MEMORY_EXIT if may_fall_back else 1


if __name__ == "__main__":
    main(*sys.argv[1:])
