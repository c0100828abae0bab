"""Tells a rank that is stuck from one that is slow, and collects what all ranks were doing.

A supervisor sees its own rank only: when the last beat was, and whether the process is stopped. A
rank that waits inside a collective is quiet too, and no culprit. So the first that finds its rank
quiet for too long asks all in the run folder; each answers with its last beat and its stacks, and
the one that asked decides: stuck is a run of which no rank comes further.
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

LOOK_S = 2.0
# A thread takes a moment to write its stack, and one that waits for a disk never does.
STACKS_S = 5.0
ANSWERS_S = 30.0
# What a rank that is done has to end.
EXIT_S = 30.0
MOST_STACK_BYTES = 200_000


class Watchdog:
    """Watches over one child; make one for each."""

    def __init__(self, run: Run, rank: RankInfo, restart_index: int) -> None:
        """A pipe for beats and a file for stacks, for a child that is started next.

        Args:
            run: the run.
            rank: the rank.
            restart_index: number of recoveries before this start.
        """
        self.rank = rank
        self._stacks = run.paths.stacks
        self._start = rendezvous_file(run.paths, rank, restart_index).stem
        self._pulse = LivenessMonitor(run.cluster, run.read_plan())
        self._memory = os.memfd_create("stacks", os.MFD_CLOEXEC)
        self._pid = 0
        self._requests = 0
        self._asked: Path | None = None
        self._asked_s = self._searched_s = 0.0
        self._judged_s = -NEVER_S
        self._signalled_s: float | None = None
        self._stacks_bytes = 0
        self._fails = False

    @property
    def child_fds(self) -> tuple[int, int]:
        """Descriptors that the child inherits, and is told as arguments for `beats.attach`."""
        return self._pulse.childs_pipe, self._memory

    def watch(self, pid: int) -> None:
        """The child was started."""
        self._pid = pid
        os.close(self._pulse.childs_pipe)

    def close(self) -> None:
        """The child has ended."""
        self._pulse.close()
        os.close(self._memory)

    def look(self) -> RankError | None:
        """What to end the ranks for, once this rank has found that the run is stuck.

        Call it several times a second. It answers, too, what supervisors of other ranks ask.
        """
        self._pulse.look(self._pid)
        try:
            if self._seems_stuck and self._signalled_s is None and self._asked is None:
                self._ask()
            self._answer()
            error = self._judge()
        except OSError as failed:  # the folder may be back at the next look
            if not self._fails:
                log.warning("the ranks cannot be asked what they do: %s", failed)
            self._fails = True
            return None
        self._fails = False
        return error

    @property
    def hangs_at_exit(self) -> bool:
        """Whether the child has said that all is done, and does not end."""
        return self._pulse.beat.phase == "done" and self._pulse.quiet_s > EXIT_S

    @property
    def _seems_stuck(self) -> bool:
        """Whether to ask; not again soon after it was found to wait only."""
        pulse = self._pulse
        if pulse.beat.phase == "data" and not self.rank.is_first:
            return pulse.is_stopped  # it waits for rank 0, which has a watchdog of its own
        overdue = pulse.quiet_s > pulse.limit_s
        return pulse.is_stopped or (overdue and pulse.now_s - self._judged_s > pulse.limit_s / 2)

    @property
    def _folder(self) -> Path:
        return self._stacks / f"{self._start}-{self._requests}"

    def _ask(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        request = hang_diagnosis.StackRequest(rank=self.rank.rank, at=time.time())
        if write_record_once(self._folder / "request.json", request):  # else another was faster
            self._asked, self._asked_s = self._folder, self._pulse.now_s
            log.warning("%s; asking all ranks what they do", self._said(""))

    def _answer(self) -> None:
        """Says what this rank does, once somebody asks."""
        if self._signalled_s is None:
            if self._pulse.now_s - self._searched_s > LOOK_S or self._asked == self._folder:
                self._searched_s = self._pulse.now_s
                if self._is_asked():
                    self._ask_child()
            return
        stacks = os.pread(self._memory, MOST_STACK_BYTES, 0)
        grows, self._stacks_bytes = len(stacks) != self._stacks_bytes, len(stacks)
        if (grows or not stacks) and self._pulse.now_s - self._signalled_s < STACKS_S:
            return
        text = stacks.decode(errors="replace")
        said = self._said(text)
        write_text(self._folder / f"{self.rank.rank}.txt", f"{said}\n\n{text}")
        write_record(self._folder / f"{self.rank.rank}.json", said)
        self._requests += 1
        self._signalled_s = None

    def _is_asked(self) -> bool:
        """Whether there is a request; lists the folder, so that a network file system looks."""
        if self._stacks.is_dir() and self._folder.name in os.listdir(self._stacks):
            return (self._folder / "request.json").exists()
        return False

    def _ask_child(self) -> None:
        self._signalled_s = self._judged_s = self._pulse.now_s
        self._stacks_bytes = 0
        os.truncate(self._memory, 0)
        os.lseek(self._memory, 0, os.SEEK_SET)  # where the child writes, too
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGUSR1)  # it alone: what it started would end of it

    def _said(self, stacks: str) -> hang_diagnosis.StackReport:
        pulse = self._pulse
        return hang_diagnosis.StackReport(
            rank=self.rank.rank,
            node=self.rank.node,
            phase=pulse.beat.phase,
            step=pulse.beat.step,
            phases=pulse.phases,
            beats=pulse.beats,
            quiet_s=pulse.quiet_s,
            limit_s=pulse.limit_s,
            step_s=pulse.step_s,
            stopped=pulse.is_stopped,
            waits=hang_diagnosis.waits_for_others(stacks),
        )

    def _judge(self) -> RankError | None:
        """What the rank that asked makes of the answers, once they are there."""
        if self._asked is None:
            return None
        ranks = self.rank.world_size
        answered = hang_diagnosis.answers(self._asked)
        if len(answered) < ranks and self._pulse.now_s - self._asked_s < ANSWERS_S:
            return None
        folder, self._asked = self._asked, None
        error = hang_diagnosis.judge(folder, answered, ranks, self.rank.job_id)
        if error:
            log.warning("stuck: rank %d on %s: %s", error.rank, error.node, error.message)
        else:
            log.warning("it only waits for ranks that come further")
        return error
