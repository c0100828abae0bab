"""A rank's supervisor: runs the training as a child, and starts it again when that may help.

What happens to one rank, the others cannot see: they wait inside a collective. So each has a
process beside it that holds no memory and no communicator. The supervisors meet in the run folder
alone: a new recovery there ends their children, each says that it is ready, and when all are, a
new generation of children starts, within the same allocation. After the ladder's last rung, more
nodes, one of them queues the run anew instead, and all end. Whether a job that ends starts again
is not theirs to say, but the batch script's (`requeue`).
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
from hpcft.core.paths import RunPaths
from hpcft.core.records import Cluster, Plan, Progress, Recovery
from hpcft.core.records.recovery import Action
from hpcft.planning import oom_fallback
from hpcft.planning.oom_fallback import Stage
from hpcft.recovery import limits, replan, resubmit
from hpcft.recovery.diagnosis import (
    STARTS_AGAIN,
    RankError,
    classify,
    is_secondary,
    rank_error_file,
    write_rank_error,
)
from hpcft.recovery.log import (
    FRAGMENTATION,
    append_recovery,
    current_plan,
    describe_fallbacks,
    has_recovery,
    is_superseded_start,
    read_recoveries,
    remove_last_recovery,
    saved_step,
)
from hpcft.recovery.resubmit import Entry
from hpcft.scheduler import slurm
from hpcft.staging.staged_inputs import load_run_recipe
from hpcft.training.checkpointing import node_local
from hpcft.training.distributed import rank_env, worker_channel
from hpcft.training.supervision import restart_barrier
from hpcft.training.supervision.oom_killer import OomKillCounter
from hpcft.training.supervision.watchdog import Watchdog
from hpcft.training.supervision.worker_process import ENDING, WorkerProcess

log = logging.getLogger(__name__)

POLL_S = 0.2
# Between two looks into the run folder: every rank looks, and a folder may serve a thousand.
LOOK_S = 1.0
# A rank that only lost its peer waits this long for the peer's word; folders lag behind.
RECOVERY_S = 60.0
# Until one of the ranks has queued the run anew.
QUEUED_S = 300.0
# How near its time limit a run is taken to end because of it.
LIMIT_NEAR_S = 300.0

# Failures after which all ranks start again where they are: nothing is wrong with the nodes.
HERE = ("rank_died", "nccl", "port", "stuck", FRAGMENTATION)

Another = Literal["another"]
ANOTHER_RECOVERED: Another = "another"
"""A child has to end, because another rank has written a recovery."""
Superseded = Literal["superseded"]
SUPERSEDED: Superseded = "superseded"
"""A child has to end, because the job runs elsewhere: Slurm has lost sight of this node."""

# What memory ran out for, by what the rank was doing; while preparing data no rung helps.
_STAGES: dict[str, Stage] = {
    "starting": "states",
    "model": "states",
    "training": "step",
    "evaluation": "evaluation",
    "saving": "states",
}


def main(run_folder: str, entry: Entry) -> None:
    """Runs this rank of the run in `run_folder`, as often as it takes.

    Args:
        run_folder: the run's folder.
        entry: what the ranks of another job start with, should the run need one.

    Raises:
        SystemExit: with code 1, when the rank failed; it has said why.
    """
    paths = RunPaths(Path(run_folder))
    check_private(paths.folder)
    logging.basicConfig(stream=sys.stdout, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("hpcft").setLevel(logging.INFO)
    os.environ["HF_HUB_OFFLINE"] = "1"  # planned anew, too, nothing waits for a network
    me = rank_env.rank_info()
    code = 1
    try:
        supervisor = Supervisor(paths, me, entry)
        try:
            code = supervisor.run()
        finally:
            supervisor.end_child()
            node_local.remove_node_folder(node_local.node_folder(paths, supervisor.cluster, me))
    except BaseException as error:
        # Interrupted, out of time, or a fault of ours: the rank ends, and says so.
        kind = "DataError" if isinstance(error, HpcftError) else type(error).__name__
        log.error("the rank ends: %s", kind, exc_info=not isinstance(error, KeyboardInterrupt))
        told = _error_of(me, kind, str(error) or "it was told to end")
        cancelled = isinstance(error, KeyboardInterrupt)
        write_rank_error(
            paths, told.model_copy(update={"failure": "cancelled"}) if cancelled else told
        )
    if code:
        raise SystemExit(code)


class Supervisor:
    """Runs one rank, generation after generation."""

    def __init__(self, paths: RunPaths, me: rank_env.RankInfo, entry: Entry) -> None:
        self.paths = paths
        self.entry = entry
        self.me = me
        self.recipe = load_run_recipe(paths)
        self.cluster = read_record(paths.cluster, Cluster)
        self.kills = OomKillCounter()
        self.child: WorkerProcess | None = None
        self.generation = 0
        self.time_limit_at = self._limit_at()
        self.told: signal.Signals | None = None

    def _limit_at(self) -> float:
        """Unix time at which the job meets its time limit; rank 0's training saves before it."""
        known = os.environ.get("SLURM_JOB_END_TIME")  # since Slurm 23.02
        if known is None and self.me.is_first and self.cluster.scheduler == "slurm":
            told = slurm.time_limit_at(self.me.job_id)
            if told is not None:
                known = os.environ["SLURM_JOB_END_TIME"] = f"{told:.0f}"
        return (
            float(known)
            if known
            else time.time() + 60 * read_record(self.paths.plan, Plan).time_min
        )

    @property
    def is_told(self) -> bool:
        """Whether this rank has been told to end."""
        return self.told is not None

    def run(self) -> int:
        """0 when the training is done, 1 when it has ended too early."""
        for signum in ENDING:
            signal.signal(signum, self._forward)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)  # submitit's handler only logs it
        if not restart_barrier.record_slurm_restart(
            self.paths, self.me, self.recipe, self.cluster, lambda: self.is_told
        ):
            return 1
        while True:
            taken = read_recoveries(self.paths)
            self.generation = len(taken)
            if taken:
                self._say_that_it_starts_again(taken[-1])
                restart_barrier.wait_for_all_ranks(
                    self.paths, self.me, self.generation, lambda: self.is_told
                )
                if taken[-1].action == "resubmit" and taken[-1].job_id == self.me.job_id:
                    return self._leave(taken[-1])
            rank_error_file(self.paths, self.me.rank).unlink(
                missing_ok=True
            )  # of the generation before
            plan = current_plan(self.paths, self.recipe, self.cluster)
            watchdog = Watchdog(self.paths, self.me, self.cluster, plan, self.generation)
            expands = any(recovery.cause == FRAGMENTATION for recovery in taken)
            self.child = WorkerProcess(self.paths, self.generation, watchdog, expands=expands)
            end = self._watch(self.child, watchdog)
            if end == 0:
                return 0
            if end == SUPERSEDED:
                log.warning("Slurm has started the job again elsewhere: this start of it ends")
                self.end_child(at_once=True)
                return 1
            if end != ANOTHER_RECOVERED and not self._is_answered(end):
                return 1
            self.end_child(at_once=True)

    def _say_that_it_starts_again(self, last: Recovery) -> None:
        words = last.change or f"step {last.step} after {last.cause}"
        for stream in (sys.stdout, sys.stderr):
            stream.write(f"{STARTS_AGAIN} with {words}\n")
            stream.flush()

    # ------------------------------------------------------------ the child

    def _watch(
        self, child: WorkerProcess, watchdog: Watchdog
    ) -> int | RankError | Another | Superseded:
        """The child's exit code, or that it is stuck, or that another rank has met something."""
        looked = time.monotonic()
        while (code := child.wait(POLL_S)) is None:
            self.kills.look()
            if stuck := watchdog.look():
                return stuck
            if watchdog.hangs_at_exit:
                log.warning("the training is done, but its process does not end: it is ended")
                self.end_child(at_once=True)
                return 0
            if time.monotonic() - looked > LOOK_S:
                looked = time.monotonic()
                if not has_recovery(self.paths, self.generation + 1):
                    continue
                if is_superseded_start(self.paths, self.me.job_id, slurm.restart_count()):
                    return SUPERSEDED
                # A single rank takes its rungs itself, and goes on.
                if self.me.world_size > 1:
                    return ANOTHER_RECOVERED
        return code

    def end_child(self, *, at_once: bool = False) -> None:
        """Ends the child, if there is one, and all that it has started."""
        if self.child is not None:
            self.child.end(at_once=at_once)
            self.child = None

    def _forward(self, signum: int, _frame: FrameType | None) -> None:
        if signum in ENDING:
            self.told = self.told or signal.Signals(signum)
        if self.child is not None:
            self.child.signal(signum)

    # ------------------------------------------------------------ when it ends

    def _is_answered(self, code: int | RankError) -> bool:
        """Whether all ranks start again after this; if not, it is told why it ended."""
        if isinstance(code, RankError):
            return self._start_again(code)
        error = read_record_if_exists(rank_error_file(self.paths, self.me.rank), RankError)
        if code == worker_channel.SAVED_EXIT:
            write_rank_error(self.paths, self._told_to_end())
            return False
        if code == worker_channel.OUT_OF_MEMORY_EXIT and error is not None:
            fragmented = error.failure == FRAGMENTATION
            return self._start_again(error) if fragmented else self._step_down(error)
        if code == -signal.SIGKILL:
            # Whoever kills the whole job kills this process too, within a moment.
            time.sleep(LOOK_S)
            if self.kills.rose():
                text = "the kernel killed it for lack of memory (oom_kill)"
                error = _error_of(self.me, "Killed", text, phase=self._phase())
                write_rank_error(self.paths, error)
                return self.cluster.accelerator == "cpu" and self._step_down(error)
        # NCCL ends a process whose peer is gone with SIGABRT, and says so in the log.
        aborted = code == -signal.SIGABRT
        followed = aborted or (error is not None and is_secondary(error))
        if followed and self.me.world_size > 1 and self._gets_a_recovery():
            return True
        if self.is_told:
            write_rank_error(self.paths, self._told_to_end())
            return False
        if error is None:
            error = _error_of(self.me, "Died", _end_in_words(code), phase=self._phase())
            write_rank_error(self.paths, error)
        return self._start_again(error)

    def _told_to_end(self) -> RankError:
        """What ended this rank, when it was nothing of its own."""
        if self.cluster.scheduler == "local":
            cause, text = "cancelled", "it was told to end"
        elif self.time_limit_at - time.time() < LIMIT_NEAR_S and self.told != signal.SIGTERM:
            cause, text = "timeout", "the time limit is near"
        else:
            told = f" ({self.told.name})" if self.told else ""
            cause, text = "preempted", f"the scheduler told it to end{told}"
        error = _error_of(self.me, "Ended", text)
        return error.model_copy(update={"failure": cause})

    def _start_again(self, error: RankError) -> bool:
        """Has all ranks start again within the allocation; whether that may help."""
        failure = classify(error)
        if failure is None or failure.name not in HERE:
            return False
        number = self._next_number()
        if has_recovery(self.paths, number):
            return True
        step = saved_step(self.paths)
        obstacle = limits.restart_limit_reason(read_recoveries(self.paths), failure.name, step)
        if obstacle:
            update = {"failure": "stuck", "message": f"{failure.sentence}; {obstacle}"}
            write_rank_error(self.paths, error.model_copy(update=update))
            return False
        plan = current_plan(self.paths, self.recipe, self.cluster)
        append_recovery(
            self.paths, plan, plan, number=number, action="restart", who=error,
            cause=failure.name, step=step, restart=slurm.restart_count(),
        )  # fmt: skip
        return True

    def _next_number(self) -> int:
        # Alone, the child has taken rungs of its own since it was started.
        alone = self.me.world_size == 1
        return 1 + (len(read_recoveries(self.paths)) if alone else self.generation)

    def _step_down(self, error: RankError) -> bool:
        """Takes the rung below, unless another rank has; whether there is one."""
        before = current_plan(self.paths, self.recipe, self.cluster)
        number = self._next_number()
        if has_recovery(self.paths, number):
            return True
        stage = _STAGES.get(error.phase)
        action: Action = "restart"
        after = stage and oom_fallback.next_fallback(before, self.recipe, self.cluster, stage)
        if stage and not after:
            action = "resubmit"
            after = replan.plan_on_more_nodes(before, self.recipe, self.cluster)
        if not after:
            write_rank_error(self.paths, self._exhausted(error, before))
            return False
        append_recovery(
            self.paths,
            before,
            after,
            number=number,
            action=action,
            who=error,
            step=saved_step(self.paths),
            restart=slurm.restart_count(),
        )
        return True

    def _exhausted(self, error: RankError, plan: Plan, obstacle: str = "") -> RankError:
        """The error of a rank that no rung can help, with what was tried and what may help.

        Args:
            error: what the rank said.
            plan: what ran.
            obstacle: why the run cannot queue itself anew on more nodes.
        """
        tried = describe_fallbacks(read_recoveries(self.paths))
        more = oom_fallback.next_node_count(plan.layout, self.recipe, self.cluster)
        if error.phase not in _STAGES:
            advice = "preparing the data takes more memory than a node has: limit task.data"
        elif more and (obstacle or self.recipe.resources.nodes != "auto"):
            advice = f"set resources.nodes: {more} and submit it again"
            advice += f" (it could not do so itself: {obstacle})" if obstacle else ""
        else:
            unit = "GPUs" if plan.accelerator == "cuda" else "nodes"
            advice = (
                f"take {unit} with more memory, a smaller task.max_length, or a method that "
                "trains less (lora, qlora)"
            )
        return error.model_copy(
            update={
                "failure": "out_of_memory",
                "message": f"rank {error.rank} on {error.node} was out of memory "
                f"({error.phase}): {error.message}; "
                + (f"tried before: {tried}" if tried else "there is no lower rung"),
                "next_step": advice,
            }
        )

    def _gets_a_recovery(self) -> bool:
        """Whether the rank that went away left a recovery; its folder may lag behind."""
        deadline = time.monotonic() + RECOVERY_S
        while time.monotonic() < deadline and not self.is_told:
            if has_recovery(self.paths, self.generation + 1):
                return True
            time.sleep(LOOK_S)
        return False

    # ------------------------------------------------------------ more nodes

    def _leave(self, rung: Recovery) -> int:
        """Ends this rank once its run is queued anew; 1 when that cannot be."""
        deadline = time.monotonic() + QUEUED_S
        while not resubmit.is_resubmitted(self.paths, self.me.job_id):
            if rung.rank == self.me.rank and not self.is_told:
                return self._queue_anew(rung)
            if self.is_told or not has_recovery(self.paths, rung.number):
                return 1  # the rank that could not queue it says why
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank {rung.rank} has not queued the run anew; see its log")
            time.sleep(LOOK_S)
        return 0

    def _queue_anew(self, rung: Recovery) -> int:
        """Queues the run on more nodes; 0 when that is done."""
        error = read_record(rank_error_file(self.paths, self.me.rank), RankError)
        plan = read_record(self.paths.current_plan, Plan)
        try:
            job_id = resubmit.resubmit(self.paths, plan, self.cluster, self.me.job_id, self.entry)
        except (slurm.Refused, ClusterError) as refused:
            before = remove_last_recovery(self.paths, rung, self.recipe, self.cluster)
            write_rank_error(self.paths, self._exhausted(error, before, str(refused)))
            return 1
        log.info("out of memory: queued anew as job %s: %s", job_id, rung.change)
        return 0

    def _phase(self) -> str:
        progress = read_record_if_exists(self.paths.progress, Progress)
        return progress.phase if progress else "starting"


def _end_in_words(code: int) -> str:
    if code < 0:
        return f"the training process was ended by {signal.Signals(-code).name}"
    return f"the training process ended without a word, with exit code {code}"


def _error_of(me: rank_env.RankInfo, kind: str, message: str, phase: str = "") -> RankError:
    return RankError(
        rank=me.rank,
        node=me.node,
        at=time.time(),
        kind=kind,
        message=message,
        job_id=me.job_id,
        phase=phase,
    )
