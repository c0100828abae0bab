"""Supervisor: runs a rank's training in a worker process, and restarts it where that may help.

When a rank fails, the other ranks cannot see it: they wait inside a collective. So each rank has a
supervisor, which holds neither GPU memory nor a communicator. The supervisors communicate through
the run folder only: when a rank writes a recovery there, all supervisors end their workers, wait
for each other, and start new workers within the same allocation. The last fallback needs more
nodes: then one supervisor resubmits the run, and all end. The batch script decides whether a job
that ends is requeued (`training.requeue`).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Literal

from hpcft.core.errors import ClusterError, HpcftError
from hpcft.core.files import check_private, read_record, read_record_if_exists
from hpcft.core.host import wait_until
from hpcft.core.log_markers import RESTART_LINE
from hpcft.core.paths import RunPaths
from hpcft.core.rank_errors import rank_error_file, write_rank_error
from hpcft.core.records import Progress, RankError, Recovery
from hpcft.recovery import resubmit
from hpcft.recovery.diagnosis import is_secondary
from hpcft.recovery.log import FRAGMENTATION, is_superseded_start
from hpcft.recovery.retry import RETRY_S, Retry
from hpcft.recovery.run import Run
from hpcft.scheduler import slurm_job
from hpcft.scheduler.protocol import Refused
from hpcft.training.checkpointing import node_local, nvme_offload
from hpcft.training.distributed import writable_caches
from hpcft.training.distributed.rank_env import RankInfo, rank_info
from hpcft.training.distributed.stop_signal import STOP_SIGNALS
from hpcft.training.distributed.worker_channel import OUT_OF_MEMORY_EXIT, SAVED_EXIT
from hpcft.training.supervision import recover, restart_barrier
from hpcft.training.supervision.oom_killer import OomKillCounter
from hpcft.training.supervision.watchdog import Watchdog
from hpcft.training.supervision.worker_process import WorkerProcess

log = logging.getLogger(__name__)

POLL_S = 0.2
# Pause between two looks into the run folder, which the supervisors of a thousand ranks may share.
FOLDER_POLL_S = 1.0
# Time that a rank which lost a peer waits for the peer's recovery; a shared folder may lag behind.
RECOVERY_S = 60.0
# Time until one of the ranks has resubmitted the run, for which the controller has to answer.
RESUBMIT_S = 300.0 + RETRY_S
# Time that rank 0 has to write the result after the other ranks are done.
RESULT_S = 60.0
# A stop this close to the time limit is taken to be because of it.
LIMIT_NEAR_S = 300.0

Another = Literal["another"]
ANOTHER_RECOVERED: Another = "another"
"""Another rank has written a recovery, so this worker has to end."""
Superseded = Literal["superseded"]
SUPERSEDED: Superseded = "superseded"
"""The job runs elsewhere, because Slurm has lost contact to this node: this worker has to end."""


def main(run_folder: str) -> None:
    """Supervises this rank of a run until it is done.

    Args:
        run_folder: the run's folder.

    Raises:
        SystemExit: with code 1, if the rank failed; its error file says why.
        StoreError: others may write to the folder, so that nothing may be written there.
    """
    paths = RunPaths(Path(run_folder))
    check_private(paths.folder)
    writable_caches.use_run_folder_if_needed(paths)
    logging.basicConfig(stream=sys.stdout, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("hpcft").setLevel(logging.INFO)
    os.environ["HF_HUB_OFFLINE"] = "1"  # The supervisor may plan, on a node without network.
    rank = rank_info()
    code = 1
    try:
        code = _supervise(Run.open(paths.folder), rank)
    except BaseException as error:
        # Interrupted, out of time, or a bug: the rank ends, and its error file says so.
        kind = "DataError" if isinstance(error, HpcftError) else type(error).__name__
        was_cancelled = isinstance(error, KeyboardInterrupt)
        message = str(error) or "the rank was interrupted"
        log.error("the rank ends: %s: %s", kind, message, exc_info=not was_cancelled)
        failure = "cancelled" if was_cancelled else ""
        write_rank_error(paths, rank.error(kind, message, failure=failure))
    if code:
        raise SystemExit(code)


def _supervise(run: Run, rank: RankInfo) -> int:
    supervisor = Supervisor(run, rank)
    try:
        return supervisor.run_worker()
    finally:
        supervisor.end_worker()
        node_local.remove_node_folder(node_local.node_folder(run.paths, run.cluster, rank))
        nvme_offload.remove_own_folders(run.paths, run.cluster, rank)


class Supervisor:
    """Runs the worker of one rank, and restarts it as long as that may help."""

    def __init__(self, run: Run, rank: RankInfo) -> None:
        """Prepares to run a worker.

        Args:
            run: the run.
            rank: this rank.
        """
        self.run = run
        self.rank = rank
        self.oom_kills = OomKillCounter()
        self.worker: WorkerProcess | None = None
        self.restart_index = 0
        self.time_limit_at = self._limit_at()
        self.stop_signal: signal.Signals | None = None

    def _limit_at(self) -> float:
        """Returns the Unix time of the job's time limit; rank 0's worker saves before it."""
        end_time = os.environ.get("SLURM_JOB_END_TIME")  # Slurm sets it since 23.02.
        if end_time is None and self.rank.is_first and self.run.cluster.scheduler == "slurm":
            limit_at = slurm_job.time_limit_at(self.rank.job_id)
            if limit_at is not None:
                end_time = os.environ["SLURM_JOB_END_TIME"] = f"{limit_at:.0f}"
        return float(end_time) if end_time else time.time() + 60 * self.run.read_plan().time_min

    @property
    def is_stopping(self) -> bool:
        """Whether this rank has received a stop signal."""
        return self.stop_signal is not None

    def run_worker(self) -> int:
        """Returns 0 if the training is done, 1 if it has ended too early."""
        for signum in STOP_SIGNALS:
            signal.signal(signum, self._forward)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)  # submitit's handler would only log it.
        run, rank, is_stopping = self.run, self.rank, lambda: self.is_stopping
        if run.has_result():
            log.info("the run is complete: this start of it has nothing left to do")
            return 0
        if not restart_barrier.record_slurm_restart(run, rank, is_stopping):
            return 1
        while True:
            recoveries = run.read_recoveries()
            self.restart_index = len(recoveries)
            if recoveries:
                self._log_restart(recoveries[-1])
                if not restart_barrier.wait_for_all_ranks(
                    run, rank, self.restart_index, is_stopping
                ):
                    write_rank_error(run.paths, self._stopped_error())
                    return 1
                if recoveries[-1].action == "resubmit" and recoveries[-1].job_id == rank.job_id:
                    return self._leave(recoveries[-1])
            rank_error_file(run.paths, rank.rank).unlink(missing_ok=True)
            watchdog = Watchdog(run, rank, self.restart_index)
            expandable = any(recovery.cause == FRAGMENTATION for recovery in recoveries)
            self.worker = WorkerProcess(
                run.paths, self.restart_index, watchdog, expandable_segments=expandable
            )
            end = self._watch(self.worker, watchdog)
            if end == 0:
                return 0
            if self._is_complete(watchdog):
                log.warning("the run is complete; its process ended wrongly after that: %s", end)
                return 0
            if end == SUPERSEDED:
                log.warning("Slurm has restarted the job on other nodes: this start of it ends")
                self.end_worker(at_once=True)
                return 1
            if end != ANOTHER_RECOVERED and not self._restarts_after(end):
                return 1
            self.end_worker(at_once=True)

    def _log_restart(self, last: Recovery) -> None:
        text = last.change or f"step {last.step} after {last.cause}"
        for stream in (sys.stdout, sys.stderr):
            stream.write(f"{RESTART_LINE} with {text}\n")
            stream.flush()

    # ------------------------------------------------------------ the worker

    def _watch(
        self, worker: WorkerProcess, watchdog: Watchdog
    ) -> int | RankError | Another | Superseded:
        """Waits until the worker ends or has to end; returns its exit code, or the reason."""
        polled_at = time.monotonic()
        while (code := worker.wait(POLL_S)) is None:
            self.oom_kills.poll()
            if hang := watchdog.poll():
                return hang
            if watchdog.hangs_at_exit:
                log.warning("the training is done, but its process does not end: it is killed")
                self.end_worker(at_once=True)
                return 0
            if time.monotonic() - polled_at > FOLDER_POLL_S:
                polled_at = time.monotonic()
                if not self.run.has_recovery(self.restart_index + 1):
                    continue
                paths, job_id = self.run.paths, self.rank.job_id
                if is_superseded_start(paths, job_id, slurm_job.restart_count()):
                    return SUPERSEDED
                # A single rank applies its fallbacks itself, and continues.
                if self.rank.world_size > 1:
                    return ANOTHER_RECOVERED
        return code

    def _is_complete(self, watchdog: Watchdog) -> bool:
        """Returns whether the run has its result, so that how the worker ended does not matter.

        A library may crash at the exit of a process, after all of the work. Rank 0 writes the
        result a moment after the other ranks have reported that they are done.
        """
        if watchdog.is_worker_done:
            wait_until(lambda: self.is_stopping or self.run.has_result(), RESULT_S, POLL_S)
        return self.run.has_result()

    def end_worker(self, *, at_once: bool = False) -> None:
        """Ends the worker, if there is one, and all processes that it has started."""
        if self.worker is not None:
            self.worker.end(at_once=at_once)
            self.worker = None

    def _forward(self, signum: int, _frame: FrameType | None) -> None:
        self.stop_signal = self.stop_signal or signal.Signals(signum)
        if self.worker is not None:
            self.worker.signal(signum)

    # ------------------------------------------------------------ when it ends

    def _restarts_after(self, end: int | RankError) -> bool:
        """Returns whether all ranks restart; if not, writes the reason into the error file."""
        run, rank = self.run, self.rank
        if isinstance(end, RankError):
            return recover.restart_all_ranks(run, end, self._next_number())
        error = read_record_if_exists(rank_error_file(run.paths, rank.rank), RankError)
        if end == SAVED_EXIT:
            write_rank_error(run.paths, self._stopped_error())
            return False
        if end == OUT_OF_MEMORY_EXIT and error is not None:
            fragmented = error.failure == FRAGMENTATION
            recovery = recover.restart_all_ranks if fragmented else recover.fall_back
            return recovery(run, error, self._next_number())
        if end == -signal.SIGKILL:
            # If the whole job is being killed, this process ends within a moment too.
            time.sleep(FOLDER_POLL_S)
            if self.oom_kills.has_risen():
                message = "the kernel killed the training for lack of memory (oom_kill)"
                error = rank.error("Killed", message, phase=self._phase())
                write_rank_error(run.paths, error)
                on_cpu = run.cluster.accelerator == "cpu"
                return on_cpu and recover.fall_back(run, error, self._next_number())
        # NCCL aborts a process whose peer is gone, and logs it.
        aborted = end == -signal.SIGABRT
        secondary = aborted or (error is not None and is_secondary(error))
        if secondary and rank.world_size > 1 and self._gets_a_recovery():
            return True
        if self.is_stopping:
            write_rank_error(run.paths, self._stopped_error())
            return False
        if error is None:
            error = rank.error("Died", _describe_exit(end), phase=self._phase())
            write_rank_error(run.paths, error)
        return recover.restart_all_ranks(run, error, self._next_number())

    def _stopped_error(self) -> RankError:
        """Returns the error of an external stop: cancelled, time limit or preemption."""
        if self.rank.is_first and self.run.cluster.scheduler == "slurm":
            # An administrator may have raised it.
            limit_at = slurm_job.current_time_limit_at(self.rank.job_id)
            self.time_limit_at = limit_at or self.time_limit_at
        left_s = self.time_limit_at - time.time()
        near_limit = -LIMIT_NEAR_S < left_s < LIMIT_NEAR_S
        if self.run.cluster.scheduler == "local":
            failure, message = "cancelled", "the run was cancelled"
        elif near_limit and self.stop_signal != signal.SIGTERM:
            failure, message = "timeout", "the time limit is near"
        else:
            name = f" ({self.stop_signal.name})" if self.stop_signal else ""
            failure, message = "preempted", f"the scheduler stopped the rank{name}"
        return self.rank.error("Ended", message, failure=failure)

    def _next_number(self) -> int:
        # The worker of a single rank applies fallbacks of its own after its start.
        is_single = self.rank.world_size == 1
        return 1 + (len(self.run.read_recoveries()) if is_single else self.restart_index)

    def _gets_a_recovery(self) -> bool:
        """Returns whether the rank that failed has written a recovery; waits for it."""
        number = self.restart_index + 1
        wait_until(
            lambda: self.is_stopping or self.run.has_recovery(number), RECOVERY_S, FOLDER_POLL_S
        )
        return not self.is_stopping and self.run.has_recovery(number)

    # ------------------------------------------------------------ more nodes

    def _leave(self, recovery: Recovery) -> int:
        """Ends this rank after one of them has resubmitted the run; returns 1 if none could."""
        run, job_id = self.run, self.rank.job_id

        def is_decided() -> bool:
            is_resubmitted = resubmit.is_resubmitted(run.paths, job_id)
            return is_resubmitted or self.is_stopping or not run.has_recovery(recovery.number)

        is_resubmitted = resubmit.is_resubmitted(run.paths, job_id)
        if recovery.rank == self.rank.rank and not (is_resubmitted or self.is_stopping):
            return self._resubmit(recovery)
        if not wait_until(is_decided, RESUBMIT_S, FOLDER_POLL_S):
            raise TimeoutError(
                f"rank {recovery.rank} has not resubmitted the run within {RESUBMIT_S:.0f} s; "
                "see its log"
            )
        # If it could not be resubmitted, the error file of that rank says why.
        return 0 if resubmit.is_resubmitted(run.paths, job_id) else 1

    def _resubmit(self, recovery: Recovery) -> int:
        """Submits the run on more nodes; returns 0 if Slurm has taken the job, else 1."""
        run, rank = self.run, self.rank
        error = read_record(rank_error_file(run.paths, rank.rank), RankError)
        try:
            job_id = Retry()(lambda: resubmit.resubmit(run, run.read_plan(), rank.job_id))
        except (Refused, ClusterError) as refused:
            before = run.remove_last_recovery()
            write_rank_error(run.paths, recover.exhausted(run, error, before, str(refused)))
            return 1
        log.info("out of memory: resubmitted as job %s: %s", job_id, recovery.change)
        return 0

    def _phase(self) -> str:
        progress = read_record_if_exists(self.run.paths.progress, Progress)
        return progress.phase if progress else "starting"


def _describe_exit(code: int) -> str:
    if code < 0:
        return f"the training process was ended by {signal.Signals(-code).name}"
    return f"the training process ended with exit code {code} and no error message"
