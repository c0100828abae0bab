"""Watchdog: tells a hang from a slow rank, and collects the stacks of all ranks.

A supervisor sees only its own worker: the time of its last heartbeat, and whether it is stopped. A
worker that waits inside a collective is quiet too, though it is not at fault. So the first watchdog
whose worker is quiet for too long writes a request into the run folder. Each watchdog answers with
a report and the stacks of its worker, and the one that requested them decides: the run hangs if no
rank makes progress.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from pathlib import Path

from hpcft.core.files import write_record, write_record_once, write_text
from hpcft.core.records import RankError
from hpcft.recovery.run import Run
from hpcft.training.distributed.rank_env import RankInfo
from hpcft.training.distributed.rendezvous import rendezvous_file
from hpcft.training.supervision import hang_diagnosis
from hpcft.training.supervision.liveness import NEVER_S, LivenessMonitor

log = logging.getLogger(__name__)

FOLDER_POLL_S = 2.0
# A thread needs a moment to write its stack, and one that waits for a disk never does.
STACKS_S = 5.0
REPORTS_S = 30.0
# Time that a worker has to end after it has reported that it is done.
EXIT_S = 30.0
MAX_STACK_BYTES = 200_000


class Watchdog:
    """Watches over one worker process; each new worker needs a new one."""

    def __init__(self, run: Run, rank: RankInfo, restart_index: int) -> None:
        """Opens the channel of a worker that is started next.

        Args:
            run: the run.
            rank: this rank.
            restart_index: number of recoveries before this start.
        """
        self.rank = rank
        self._stacks = run.paths.stacks
        self._start = rendezvous_file(run.paths, rank, restart_index).stem
        self._liveness = LivenessMonitor(run.cluster, run.read_plan())
        self._stacks_fd = os.memfd_create("stacks", os.MFD_CLOEXEC)
        self._pid = 0
        self._requests = 0
        self._own_request: Path | None = None
        self._requested_s = self._searched_s = 0.0
        self._reported_s = -NEVER_S
        self._signalled_s: float | None = None
        self._stacks_bytes = 0
        self._folder_fails = False

    @property
    def worker_fds(self) -> tuple[int, int]:
        """Descriptors that the worker inherits, for `worker_channel.connect`: pipe, stacks."""
        return self._liveness.worker_pipe, self._stacks_fd

    def watch(self, pid: int) -> None:
        """Begins to watch the worker of that process id, which has inherited `worker_fds`."""
        self._pid = pid
        os.close(self._liveness.worker_pipe)

    def close(self) -> None:
        """Closes the channel after the worker has ended."""
        self._liveness.close()
        os.close(self._stacks_fd)

    def poll(self) -> RankError | None:
        """Returns the error of a hang, once this rank has found one; None until then.

        It also answers the requests of other ranks. Call it several times a second.
        """
        self._liveness.poll(self._pid)
        try:
            if self._may_hang and self._signalled_s is None and self._own_request is None:
                self._request_reports()
            self._report_if_requested()
            error = self._evaluate_reports()
        except OSError as failed:  # The folder may be back at the next poll.
            if not self._folder_fails:
                log.warning("the ranks cannot be asked for their stacks: %s", failed)
            self._folder_fails = True
            return None
        self._folder_fails = False
        return error

    @property
    def is_worker_done(self) -> bool:
        """Whether the worker has reported that it is done; it may have ended since."""
        self._liveness.poll(self._pid)
        return self._liveness.heartbeat.phase == "done"

    @property
    def hangs_at_exit(self) -> bool:
        """Whether the worker has reported that it is done, and does not end."""
        liveness = self._liveness
        return liveness.heartbeat.phase == "done" and liveness.quiet_s > EXIT_S

    @property
    def _may_hang(self) -> bool:
        """Whether to request reports; not soon after this rank has reported that it waits."""
        liveness = self._liveness
        if liveness.heartbeat.phase == "data" and not self.rank.is_first:
            return liveness.is_stopped  # It waits for rank 0, which has a watchdog of its own.
        is_overdue = liveness.quiet_s > liveness.limit_s
        since_report_s = liveness.now_s - self._reported_s
        return liveness.is_stopped or (is_overdue and since_report_s > liveness.limit_s / 2)

    @property
    def _request_folder(self) -> Path:
        return self._stacks / f"{self._start}-{self._requests}"

    def _request_reports(self) -> None:
        folder = self._request_folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        request = hang_diagnosis.StackRequest(rank=self.rank.rank, at=time.time())
        if write_record_once(folder / "request.json", request):  # Otherwise another rank was first.
            self._own_request, self._requested_s = folder, self._liveness.now_s
            log.warning("%s; requesting the stacks of all ranks", self._make_report(""))

    def _report_if_requested(self) -> None:
        now_s = self._liveness.now_s
        if self._signalled_s is None:
            own = self._own_request == self._request_folder
            if own or now_s - self._searched_s > FOLDER_POLL_S:
                self._searched_s = now_s
                if self._is_requested():
                    self._request_stacks()
            return
        stacks = os.pread(self._stacks_fd, MAX_STACK_BYTES, 0)
        grows, self._stacks_bytes = len(stacks) != self._stacks_bytes, len(stacks)
        if (grows or not stacks) and now_s - self._signalled_s < STACKS_S:
            return
        text = stacks.decode(errors="replace")
        report = self._make_report(text)
        write_text(self._request_folder / f"{self.rank.rank}.txt", f"{report}\n\n{text}")
        write_record(self._request_folder / f"{self.rank.rank}.json", report)
        self._requests += 1
        self._signalled_s = None

    def _is_requested(self) -> bool:
        """Returns whether there is a request; lists the folder, so that NFS asks its server."""
        if self._stacks.is_dir() and self._request_folder.name in os.listdir(self._stacks):
            return (self._request_folder / "request.json").exists()
        return False

    def _request_stacks(self) -> None:
        """Signals the worker to write the stacks of its threads into the file in memory."""
        self._signalled_s = self._reported_s = self._liveness.now_s
        self._stacks_bytes = 0
        os.truncate(self._stacks_fd, 0)
        os.lseek(self._stacks_fd, 0, os.SEEK_SET)  # The worker shares this position.
        with contextlib.suppress(ProcessLookupError):
            # Only the worker itself: the signal would end the processes that it has started.
            os.kill(self._pid, signal.SIGUSR1)

    def _make_report(self, stacks: str) -> hang_diagnosis.StackReport:
        liveness = self._liveness
        return hang_diagnosis.StackReport(
            rank=self.rank.rank,
            node=self.rank.node,
            phase=liveness.heartbeat.phase,
            step=liveness.heartbeat.step,
            phases=liveness.phases,
            heartbeats=liveness.heartbeats,
            quiet_s=liveness.quiet_s,
            limit_s=liveness.limit_s,
            step_s=liveness.step_s,
            stopped=liveness.is_stopped,
            waits=hang_diagnosis.waits_for_others(stacks),
        )

    def _evaluate_reports(self) -> RankError | None:
        """Diagnoses the reports that this rank requested, once all are there or the time is up."""
        if self._own_request is None:
            return None
        ranks = self.rank.world_size
        reports = hang_diagnosis.read_reports(self._own_request)
        if len(reports) < ranks and self._liveness.now_s - self._requested_s < REPORTS_S:
            return None
        folder, self._own_request = self._own_request, None
        error = hang_diagnosis.diagnose_hang(folder, reports, ranks, self.rank.job_id)
        if error:
            log.warning("the run hangs: rank %d on %s: %s", error.rank, error.node, error.message)
        else:
            log.warning("no hang: this rank waits for ranks that make progress")
        return error
