"""Supervisor: runs a rank's training as a process of its own, and restarts it where that may help.

The ranks of a run cannot see what happens to one of them: they wait inside a collective. So each
has a supervisor beside it that holds neither memory nor a communicator. The supervisors meet in the
run folder alone: a new recovery there makes them end their workers; each says when it is ready, and
when all are, all start their workers again within the same allocation. After the last fallback,
more nodes, one of them resubmits the run instead, and all end. Whether a job that ends is requeued
is decided by the batch script (`training.requeue`).
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
from hpcft.core.files import read_record, read_record_if_exists
from hpcft.core.log_markers import STARTS_AGAIN
from hpcft.core.rank_errors import rank_error_file, write_rank_error
from hpcft.core.records import Progress, RankError, Recovery
from hpcft.recovery import resubmit
from hpcft.recovery.diagnosis import is_secondary
from hpcft.recovery.log import FRAGMENTATION, is_superseded_start
from hpcft.recovery.resubmit import Entry
from hpcft.recovery.run import Run
from hpcft.scheduler import slurm
from hpcft.training.checkpointing import node_local
from hpcft.training.distributed import rank_env
from hpcft.training.distributed.worker_channel import OUT_OF_MEMORY_EXIT, SAVED_EXIT
from hpcft.training.supervision import recover, restart_barrier
from hpcft.training.supervision.oom_killer import OomKillCounter
from hpcft.training.supervision.watchdog import Watchdog
from hpcft.training.supervision.worker_process import ENDING, WorkerProcess

log = logging.getLogger(__name__)

POLL_S = 0.2
# Between two looks into the run folder: every rank looks, and a folder may serve a thousand.
LOOK_S = 1.0
# A rank that only lost its peer waits this long for the peer's recovery; folders lag behind.
RECOVERY_S = 60.0
# Until one of the ranks has resubmitted the run.
RESUBMIT_S = 300.0
# A stop this close to the time limit is taken to be because of it.
LIMIT_NEAR_S = 300.0

Another = Literal["another"]
ANOTHER_RECOVERED: Another = "another"
"""The worker has to end, because another rank has written a recovery."""
Superseded = Literal["superseded"]
SUPERSEDED: Superseded = "superseded"
"""The worker has to end, because the job runs elsewhere: Slurm has lost sight of this node."""


def main(run_folder: str, entry: Entry) -> None:
    """Supervises this rank of a run until it is done.

    Args:
        run_folder: the run's folder.
        entry: what the ranks of another job start with, should the run be resubmitted.

    Raises:
        SystemExit: with code 1, when the rank failed; it has written why.
    """
    run = Run.open(Path(run_folder))
    logging.basicConfig(stream=sys.stdout, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("hpcft").setLevel(logging.INFO)
    os.environ["HF_HUB_OFFLINE"] = "1"  # planning on more nodes waits for no network either
    rank = rank_env.rank_info()
    code = 1
    try:
        supervisor = Supervisor(run, rank, entry)
        try:
            code = supervisor.run_worker()
        finally:
            supervisor.end_worker()
            node_local.remove_node_folder(node_local.node_folder(run.paths, run.cluster, rank))
    except BaseException as error:
        # Interrupted, out of time, or a bug: the rank ends, and says so.
        kind = "DataError" if isinstance(error, HpcftError) else type(error).__name__
        was_cancelled = isinstance(error, KeyboardInterrupt)
        log.error("the rank ends: %s", kind, exc_info=not was_cancelled)
        failure = "cancelled" if was_cancelled else ""
        message = str(error) or "it was told to end"
        write_rank_error(run.paths, rank.error(kind, message, failure=failure))
    if code:
        raise SystemExit(code)


class Supervisor:
    """Runs the worker of one rank, as often as it takes."""

    def __init__(self, run: Run, rank: rank_env.RankInfo, entry: Entry) -> None:
        """Prepares to run a worker; arguments as of `main`."""
        self.run = run
        self.rank = rank
        self.entry = entry
        self.oom_kills = OomKillCounter()
        self.worker: WorkerProcess | None = None
        self.restart_index = 0
        self.time_limit_at = self._limit_at()
        self.stop_signal: signal.Signals | None = None

    def _limit_at(self) -> float:
        """Returns the Unix time of the job's time limit; rank 0's worker saves before it."""
        known = os.environ.get("SLURM_JOB_END_TIME")  # since Slurm 23.02
        if known is None and self.rank.is_first and self.run.cluster.scheduler == "slurm":
            limit_at = slurm.time_limit_at(self.rank.job_id)
            if limit_at is not None:
                known = os.environ["SLURM_JOB_END_TIME"] = f"{limit_at:.0f}"
        return float(known) if known else time.time() + 60 * self.run.read_plan().time_min

    @property
    def is_stopping(self) -> bool:
        """Whether this rank was told to end."""
        return self.stop_signal is not None

    def run_worker(self) -> int:
        """Returns 0 when the training is done, 1 when it has ended too early."""
        for signum in ENDING:
            signal.signal(signum, self._forward)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)  # submitit's handler only logs it
        run, rank, is_stopping = self.run, self.rank, lambda: self.is_stopping
        if not restart_barrier.record_slurm_restart(run, rank, is_stopping):
            return 1
        while True:
            recoveries = run.read_recoveries()
            self.restart_index = len(recoveries)
            if recoveries:
                self._log_restart(recoveries[-1])
                restart_barrier.wait_for_all_ranks(run, rank, self.restart_index, is_stopping)
                if recoveries[-1].action == "resubmit" and recoveries[-1].job_id == rank.job_id:
                    return self._leave(recoveries[-1])
            rank_error_file(run.paths, rank.rank).unlink(missing_ok=True)  # of the start before
            watchdog = Watchdog(run, rank, self.restart_index)
            expandable = any(recovery.cause == FRAGMENTATION for recovery in recoveries)
            self.worker = WorkerProcess(
                run.paths, self.restart_index, watchdog, expandable_segments=expandable
            )
            end = self._watch(self.worker, watchdog)
            if end == 0:
                return 0
            if end == SUPERSEDED:
                log.warning("Slurm has restarted the job elsewhere: this start of it ends")
                self.end_worker(at_once=True)
                return 1
            if end != ANOTHER_RECOVERED and not self._restarts_after(end):
                return 1
            self.end_worker(at_once=True)

    def _log_restart(self, last: Recovery) -> None:
        words = last.change or f"step {last.step} after {last.cause}"
        for stream in (sys.stdout, sys.stderr):
            stream.write(f"{STARTS_AGAIN} with {words}\n")
            stream.flush()

    # ------------------------------------------------------------ the worker

    def _watch(
        self, worker: WorkerProcess, watchdog: Watchdog
    ) -> int | RankError | Another | Superseded:
        """Returns the worker's exit code, that it hangs, or that another rank has failed."""
        looked = time.monotonic()
        while (code := worker.wait(POLL_S)) is None:
            self.oom_kills.look()
            if hang := watchdog.look():
                return hang
            if watchdog.hangs_at_exit:
                log.warning("the training is done, but its process does not end: it is killed")
                self.end_worker(at_once=True)
                return 0
            if time.monotonic() - looked > LOOK_S:
                looked = time.monotonic()
                if not self.run.has_recovery(self.restart_index + 1):
                    continue
                paths, job_id = self.run.paths, self.rank.job_id
                if is_superseded_start(paths, job_id, slurm.restart_count()):
                    return SUPERSEDED
                # A single rank applies its fallbacks itself, and continues.
                if self.rank.world_size > 1:
                    return ANOTHER_RECOVERED
        return code

    def end_worker(self, *, at_once: bool = False) -> None:
        """Ends the worker, if there is one, and all that it has started."""
        if self.worker is not None:
            self.worker.end(at_once=at_once)
            self.worker = None

    def _forward(self, signum: int, _frame: FrameType | None) -> None:
        if signum in ENDING:
            self.stop_signal = self.stop_signal or signal.Signals(signum)
        if self.worker is not None:
            self.worker.signal(signum)

    # ------------------------------------------------------------ when it ends

    def _restarts_after(self, end: int | RankError) -> bool:
        """Returns whether all ranks restart after this; if not, the reason is written."""
        run, rank = self.run, self.rank
        if isinstance(end, RankError):
            return recover.restart_all_ranks(run, end, self._next_number())
        error = read_record_if_exists(rank_error_file(run.paths, rank.rank), RankError)
        if end == SAVED_EXIT:
            write_rank_error(run.paths, self._stopped_error())
            return False
        if end == OUT_OF_MEMORY_EXIT and error is not None:
            fragmented = error.failure == FRAGMENTATION
            answer = recover.restart_all_ranks if fragmented else recover.fall_back
            return answer(run, error, self._next_number())
        if end == -signal.SIGKILL:
            # Whoever kills the whole job kills this process too, within a moment.
            time.sleep(LOOK_S)
            if self.oom_kills.rose():
                message = "the kernel killed it for lack of memory (oom_kill)"
                error = rank.error("Killed", message, phase=self._phase())
                write_rank_error(run.paths, error)
                on_cpu = run.cluster.accelerator == "cpu"
                return on_cpu and recover.fall_back(run, error, self._next_number())
        # NCCL ends a process whose peer is gone with SIGABRT, and says so in the log.
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
        near_limit = self.time_limit_at - time.time() < LIMIT_NEAR_S
        if self.run.cluster.scheduler == "local":
            failure, message = "cancelled", "it was told to end"
        elif near_limit and self.stop_signal != signal.SIGTERM:
            failure, message = "timeout", "the time limit is near"
        else:
            named = f" ({self.stop_signal.name})" if self.stop_signal else ""
            failure, message = "preempted", f"the scheduler told it to end{named}"
        return self.rank.error("Ended", message, failure=failure)

    def _next_number(self) -> int:
        # Alone, the worker has applied fallbacks of its own since it was started.
        alone = self.rank.world_size == 1
        return 1 + (len(self.run.read_recoveries()) if alone else self.restart_index)

    def _gets_a_recovery(self) -> bool:
        """Returns whether the rank that went away left a recovery; its folder may lag behind."""
        deadline = time.monotonic() + RECOVERY_S
        while time.monotonic() < deadline and not self.is_stopping:
            if self.run.has_recovery(self.restart_index + 1):
                return True
            time.sleep(LOOK_S)
        return False

    # ------------------------------------------------------------ more nodes

    def _leave(self, recovery: Recovery) -> int:
        """Ends this rank once its run is resubmitted; returns 1 when that cannot be."""
        deadline = time.monotonic() + RESUBMIT_S
        while not resubmit.is_resubmitted(self.run.paths, self.rank.job_id):
            if recovery.rank == self.rank.rank and not self.is_stopping:
                return self._resubmit(recovery)
            if self.is_stopping or not self.run.has_recovery(recovery.number):
                return 1  # the rank that could not resubmit it says why
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"rank {recovery.rank} has not resubmitted the run within {RESUBMIT_S:.0f} s; "
                    "see its log"
                )
            time.sleep(LOOK_S)
        return 0

    def _resubmit(self, recovery: Recovery) -> int:
        """Submits the run on more nodes; returns 0 when that is done."""
        run, rank = self.run, self.rank
        error = read_record(rank_error_file(run.paths, rank.rank), RankError)
        plan = run.read_plan()
        try:
            job_id = resubmit.resubmit(run.paths, plan, run.cluster, rank.job_id, self.entry)
        except (slurm.Refused, ClusterError) as refused:
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
