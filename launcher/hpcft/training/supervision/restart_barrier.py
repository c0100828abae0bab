"""Barrier of a run's supervisors before their workers restart, by files in the run folder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from hpcft.core.files import read_record_if_exists, write_record
from hpcft.core.host import wait_until
from hpcft.core.rank_errors import write_rank_error
from hpcft.core.records import Progress
from hpcft.recovery import limits
from hpcft.recovery.log import append_recovery
from hpcft.recovery.run import Run
from hpcft.scheduler import slurm
from hpcft.training.distributed import rendezvous
from hpcft.training.distributed.rank_env import RankInfo

POLL_S = 0.2
# Until all ranks are ready to start again.
READY_S = 300.0
# Between two heartbeats while nothing trains.
BEAT_S = 1.0
STARTED_AGAIN = "Slurm started the job again (preemption without notice, a failed node, or by hand)"


def record_slurm_restart(run: Run, rank: RankInfo, is_stopping: Callable[[], bool]) -> bool:
    """Writes a recovery where Slurm has restarted the job by itself; returns whether it may run.

    Rank 0 does so and the others wait for it, since all go by the number of recoveries.

    Args:
        run: the run.
        rank: this rank.
        is_stopping: whether this rank was told to end.
    """
    restart = slurm.restart_count()
    if not restart or _is_recorded(run, rank, restart):
        return True
    if not rank.is_first:
        # Where rank 0 records none, it says why.
        stopped_or_recorded = lambda: is_stopping() or _is_recorded(run, rank, restart)  # noqa: E731
        return wait_until(stopped_or_recorded, READY_S, POLL_S) and not is_stopping()
    recoveries, step = run.read_recoveries(), run.saved_step()
    reason = limits.restart_limit_reason(recoveries, "interrupted", step)
    if reason:
        message = f"{STARTED_AGAIN}; {reason}"
        write_rank_error(run.paths, rank.error("Interrupted", message, failure="stuck"))
        return False
    plan = run.read_plan()
    append_recovery(
        run.paths,
        plan,
        plan,
        number=len(recoveries) + 1,
        action="requeue",
        error=rank.error("Interrupted", STARTED_AGAIN),
        cause="interrupted",
        step=step,
        restart=restart,
    )
    return True


def _is_recorded(run: Run, rank: RankInfo, restart: int) -> bool:
    return any(
        (recovery.action, recovery.job_id, recovery.restart) == ("requeue", rank.job_id, restart)
        for recovery in run.read_recoveries()
    )


def wait_for_all_ranks(
    run: Run, rank: RankInfo, restart_index: int, is_stopping: Callable[[], bool]
) -> None:
    """Waits until every rank has ended its worker and is ready for the restart.

    Raises:
        TimeoutError: some did not come.
    """
    folder = rendezvous.rendezvous_file(run.paths, rank, restart_index).with_suffix("")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / str(rank.rank)).touch()
    deadline = time.monotonic() + READY_S
    while missing := set(map(str, range(rank.world_size))) - set(os.listdir(folder)):
        if time.monotonic() > deadline or is_stopping():
            absent = ", ".join(sorted(missing, key=int))
            raise TimeoutError(
                f"a restart needs all {rank.world_size} ranks; after {READY_S:.0f} s these were "
                f"not ready: {absent}; see their logs"
            )
        _touch_progress(run, rank)
        time.sleep(POLL_S)
    _touch_progress(run, rank)


def _touch_progress(run: Run, rank: RankInfo) -> None:
    """Keeps the run's progress from looking stale while nothing trains."""
    if not rank.is_first:
        return
    progress = read_record_if_exists(run.paths.progress, Progress)
    if progress and time.time() - progress.updated_at > BEAT_S:
        now = {"phase": "starting", "updated_at": time.time()}
        write_record(run.paths.progress, progress.model_copy(update=now))
