"""A rank's supervisor: runs the training as a child, and starts it again on a lower rung.

What one rank does when memory runs out, the others cannot see: they wait inside a collective. So
each has a process beside it that holds no memory and no communicator. The supervisors meet in the
run folder alone: a new rung there ends their children, each says that it is ready, and when all
are, a new generation of children starts, within the same allocation. After the last rung, more
nodes, one of them queues the run anew instead, and all end.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from hpcft import ladder, more_nodes, recoveries
from hpcft.cluster import slurm
from hpcft.errors import ClusterError, HpcftError
from hpcft.failures import STARTS_AGAIN, RankError, only_followed
from hpcft.ladder import Stage
from hpcft.paths import RunPaths
from hpcft.records import Cluster, Plan, Progress, Recovery
from hpcft.recoveries import How
from hpcft.stage.cache import recipe_of_run
from hpcft.store import check_private, read, read_if_there, write
from hpcft.train import rank, start
from hpcft.train.oom_kills import OomKills

log = logging.getLogger(__name__)

POLL_S = 0.2
# Between two looks into the run folder: every rank looks, and a folder may serve a thousand.
LOOK_S = 1.0
# What a child has to end by itself before it is killed.
END_S = 10.0
# A rank that only lost its peer waits this long for the peer's rung; folders lag behind.
RUNG_S = 60.0
# Until all ranks are ready to start again, and until one of them has queued the run anew.
READY_S = 300.0
QUEUED_S = 300.0
# Sent by Slurm or submitit to this process, and meant for the training. (USR2 is submitit's own.)
FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGCONT)

# What memory ran out for, by what the rank was doing; while preparing data no rung helps.
_STAGES: dict[str, Stage] = {
    "starting": "states",
    "model": "states",
    "training": "step",
    "evaluation": "evaluation",
    "saving": "states",
}


def main(run_folder: str) -> None:
    """Runs this rank of the run in `run_folder`, as often as it takes.

    Raises:
        SystemExit: with code 1, when the rank failed; it has said why.
    """
    paths = RunPaths(Path(run_folder))
    check_private(paths.folder)
    logging.basicConfig(stream=sys.stdout, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("hpcft").setLevel(logging.INFO)
    os.environ["HF_HUB_OFFLINE"] = "1"  # planned anew, too, nothing waits for a network
    me = start.who_am_i()
    code = 1
    try:
        supervisor = Supervisor(paths, me)
        try:
            code = supervisor.run()
        finally:
            supervisor.end_child()
    except BaseException as error:
        # Interrupted, out of time, or a fault of ours: the rank ends, and says so.
        kind = "DataError" if isinstance(error, HpcftError) else type(error).__name__
        log.error("the rank ends: %s", kind, exc_info=not isinstance(error, KeyboardInterrupt))
        _tell(paths, _error_of(me, kind, str(error) or "told to end"))
    if code:
        raise SystemExit(code)


class Supervisor:
    """Runs one rank, generation after generation."""

    def __init__(self, paths: RunPaths, me: start.Rank) -> None:
        self.paths = paths
        self.me = me
        self.recipe = recipe_of_run(paths)
        self.cluster = read(paths.cluster, Cluster)
        self.kills = OomKills()
        self.child: subprocess.Popen[bytes] | None = None
        self.generation = 0
        self.told_to_end = False

    def run(self) -> int:
        """0 when the training is done, 1 when it failed."""
        for signum in FORWARDED:
            signal.signal(signum, self._forward)
        while True:
            taken = recoveries.taken(self.paths)
            self.generation = len(taken)
            if taken:
                self._meet()
                if taken[-1].how == "queued anew" and taken[-1].job_id == self.me.job_id:
                    return self._leave(taken[-1])
            self._start_child()
            code = self._watch()
            if code == 0:
                return 0
            if code is not None and not self._is_answered(code):
                return 1
            self.end_child()
            words = recoveries.changes(recoveries.taken(self.paths))
            for stream in (sys.stdout, sys.stderr):
                stream.write(f"{STARTS_AGAIN} with {words}\n")
                stream.flush()

    # ------------------------------------------------------------ the child

    def _start_child(self) -> None:
        _error_file(self.paths, self.me).unlink(missing_ok=True)  # of the generation before
        command = [sys.executable, "-u", "-m", "hpcft.train.rank", str(self.paths.folder)]
        self.child = subprocess.Popen(
            [*command, str(self.generation), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _watch(self) -> int | None:
        """The child's exit code; None when it has to end because another rank took a rung."""
        assert self.child is not None
        looked = time.monotonic()
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.child.wait(timeout=POLL_S)
            self.kills.look()
            # A single rank takes its rungs itself, and goes on.
            if self.me.world_size > 1 and time.monotonic() - looked > LOOK_S:
                looked = time.monotonic()
                if recoveries.is_taken(self.paths, self.generation + 1):
                    return None

    def end_child(self) -> None:
        """Ends the child and all that it has started: first with a word, then by force."""
        if self.child is None:
            return
        self._signal_child(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.wait(timeout=END_S)
        self._signal_child(signal.SIGKILL)
        self.child.wait()
        self.child = None

    def _signal_child(self, signum: int) -> None:
        if self.child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.child.pid, signum)  # it leads a session of its own

    def _forward(self, signum: int, _frame: FrameType | None) -> None:
        self.told_to_end = self.told_to_end or signum == signal.SIGTERM
        self._signal_child(signum)

    # ------------------------------------------------------------ when it ends

    def _is_answered(self, code: int) -> bool:
        """Whether a lower rung answers the child's end; if not, it is told why it ended."""
        error = read_if_there(_error_file(self.paths, self.me), RankError)
        if code == rank.OUT_OF_MEMORY_EXIT and error is not None:
            return self._step_down(error)
        if code == -signal.SIGKILL:
            # Whoever kills the whole job kills this process too, within a moment.
            time.sleep(LOOK_S)
            if self.kills.rose():
                text = "the kernel killed it for lack of memory (oom_kill)"
                error = _error_of(self.me, "Killed", text, phase=self._phase())
                _tell(self.paths, error)
                return self.cluster.accelerator == "cpu" and self._step_down(error)
        # NCCL ends a process whose peer is gone with SIGABRT, and says so in the log.
        aborted = code == -signal.SIGABRT
        followed = aborted or (error is not None and only_followed(error))
        if followed and self.me.world_size > 1 and self._gets_a_rung():
            return True
        if error is None and not (aborted or self.told_to_end or code == -signal.SIGTERM):
            _tell(self.paths, _error_of(self.me, "Died", _end_in_words(code)))
        return False

    def _step_down(self, error: RankError) -> bool:
        """Takes the rung below, unless another rank has; whether there is one."""
        before = recoveries.plan_now(self.paths, self.recipe, self.cluster)
        # Alone, the child has taken rungs of its own since it was started.
        alone = self.me.world_size == 1
        number = 1 + (len(recoveries.taken(self.paths)) if alone else self.generation)
        if recoveries.is_taken(self.paths, number):
            return True
        stage = _STAGES.get(error.phase)
        how: How = "restarted"
        after = stage and ladder.step_down(before, self.recipe, self.cluster, stage)
        if stage and not after:
            how = "queued anew"
            after = more_nodes.planned(before, self.recipe, self.cluster)
        if not after:
            _tell(self.paths, self._exhausted(error, before))
            return False
        recoveries.take(self.paths, before, after, number=number, how=how, who=error)
        return True

    def _exhausted(self, error: RankError, plan: Plan, obstacle: str = "") -> RankError:
        """The error of a rank that no rung can help, with what was tried and what may help.

        Args:
            error: what the rank said.
            plan: what ran.
            obstacle: why the run cannot queue itself anew on more nodes.
        """
        tried = recoveries.changes(recoveries.taken(self.paths))
        more = ladder.more_nodes(plan.layout, self.recipe, self.cluster)
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

    def _gets_a_rung(self) -> bool:
        """Whether the rank that went away left a rung; its folder may lag behind."""
        deadline = time.monotonic() + RUNG_S
        while time.monotonic() < deadline and not self.told_to_end:
            if recoveries.is_taken(self.paths, self.generation + 1):
                return True
            time.sleep(LOOK_S)
        return False

    # ------------------------------------------------------------ more nodes

    def _leave(self, rung: Recovery) -> int:
        """Ends this rank once its run is queued anew; 1 when that cannot be."""
        deadline = time.monotonic() + QUEUED_S
        while not more_nodes.is_queued(self.paths, self.me.job_id):
            if rung.rank == self.me.rank and not self.told_to_end:
                return self._queue_anew(rung)
            if self.told_to_end or not recoveries.is_taken(self.paths, rung.number):
                return 1  # the rank that could not queue it says why
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank {rung.rank} has not queued the run anew; see its log")
            time.sleep(LOOK_S)
        return 0

    def _queue_anew(self, rung: Recovery) -> int:
        """Queues the run on more nodes; 0 when that is done."""
        error = read(_error_file(self.paths, self.me), RankError)
        plan = read(self.paths.effective_plan, Plan)
        try:
            job_id = more_nodes.queue(self.paths, plan, self.cluster, self.me.job_id)
        except (slurm.Refused, ClusterError) as refused:
            before = recoveries.take_back(self.paths, rung, self.recipe, self.cluster)
            _tell(self.paths, self._exhausted(error, before, str(refused)))
            return 1
        log.info("out of memory: queued anew as job %s: %s", job_id, rung.change)
        return 0

    # ------------------------------------------------------------ starting together

    def _meet(self) -> None:
        """Waits until every rank has ended its child and is ready for this generation.

        Raises:
            TimeoutError: some did not come.
        """
        folder = start.meeting(self.paths, self.me, self.generation).with_suffix("")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / str(self.me.rank)).touch()
        deadline = time.monotonic() + READY_S
        while missing := set(map(str, range(self.me.world_size))) - set(os.listdir(folder)):
            if time.monotonic() > deadline or self.told_to_end:
                absent = ", ".join(sorted(missing, key=int))
                raise TimeoutError(
                    f"to start again all {self.me.world_size} ranks have to be ready; after "
                    f"{READY_S:.0f} s these were not: {absent}; see their logs"
                )
            self._beat()
            time.sleep(POLL_S)
        self._beat()

    def _beat(self) -> None:
        """Keeps the heartbeat of rank 0 from looking dead while nothing trains."""
        if not self.me.is_first:
            return
        progress = read_if_there(self.paths.progress, Progress)
        if progress and time.time() - progress.updated_at > LOOK_S:
            now = {"phase": "starting", "updated_at": time.time()}
            write(self.paths.progress, progress.model_copy(update=now))

    def _phase(self) -> str:
        progress = read_if_there(self.paths.progress, Progress)
        return progress.phase if progress else "starting"


def _end_in_words(code: int) -> str:
    if code < 0:
        return f"the training process was ended by {signal.Signals(-code).name}"
    return f"the training process ended without a word, with exit code {code}"


def _error_file(paths: RunPaths, me: start.Rank) -> Path:
    return paths.errors / f"{me.rank}.json"


def _error_of(me: start.Rank, kind: str, message: str, phase: str = "") -> RankError:
    return RankError(
        rank=me.rank,
        node=me.node,
        at=time.time(),
        kind=kind,
        message=message,
        job_id=me.job_id,
        phase=phase,
    )


def _tell(paths: RunPaths, error: RankError) -> None:
    paths.errors.mkdir(mode=0o700, exist_ok=True)
    write(paths.errors / f"{error.rank}.json", error)
