"""Restart barrier: supervisors wait for each other, with files in the run folder."""

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
from hpcft.scheduler import slurm_job
from hpcft.training.distributed import rendezvous
from hpcft.training.distributed.rank_env import RankInfo

POLL_S = 0.2
# Time until all ranks are ready for a restart.
READY_S = 300.0
# Pause between two updates of the progress while nothing trains.
PROGRESS_S = 1.0
SLURM_RESTARTED = "Slurm restarted the job (preemption without notice, a failed node, or by hand)"


def record_slurm_restart(run: Run, rank: RankInfo, is_stopping: Callable[[], bool]) -> bool:
    """Writes a recovery if Slurm has restarted the job by itself; returns whether the rank may run.

    Rank 0 writes it and the others wait for it, because all ranks count the recoveries.

    Args:
        run: the run.
        rank: this rank.
        is_stopping: returns whether this rank has received a stop signal.
    """
    restart = slurm_job.restart_count()

    def is_recorded() -> bool:
        return any(
            (recovery.action, recovery.job_id, recovery.restart)
            == ("requeue", rank.job_id, restart)
            for recovery in run.read_recoveries()
        )

    if not restart or is_recorded():
        return True
    if not rank.is_first:
        # If rank 0 writes no recovery, its error file says why.
        wait_until(lambda: is_stopping() or is_recorded(), READY_S, POLL_S)
        return is_recorded()
    recoveries, step = run.read_recoveries(), run.saved_step()
    reason = limits.restart_limit_reason(recoveries, "interrupted", step)
    if reason:
        message = f"{SLURM_RESTARTED}; {reason}"
        advice = limits.INTERRUPTED_ADVICE
        error = rank.error("Interrupted", message, failure="stuck", next_step=advice)
        write_rank_error(run.paths, error)
        return False
    plan = run.read_plan()
    append_recovery(
        run.paths,
        plan,
        plan,
        number=len(recoveries) + 1,
        action="requeue",
        error=rank.error("Interrupted", SLURM_RESTARTED),
        cause="interrupted",
        step=step,
        restart=restart,
    )
    return True


def wait_for_all_ranks(
    run: Run, rank: RankInfo, restart_index: int, is_stopping: Callable[[], bool]
) -> bool:
    """Waits until every rank has ended its worker; returns False if this rank has to stop.

    Args:
        run: the run.
        rank: this rank, which is ready.
        restart_index: number of recoveries before the restart.
        is_stopping: returns whether this rank has received a stop signal.

    Raises:
        TimeoutError: some ranks were not ready in time.
    """
    folder = rendezvous.rendezvous_file(run.paths, rank, restart_index).with_suffix("")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / str(rank.rank)).touch()
    expected = {str(number) for number in range(rank.world_size)}
    missing = expected

    def is_over() -> bool:
        nonlocal missing
        missing = expected - set(os.listdir(folder))
        _touch_progress(run, rank)
        return not missing or is_stopping()

    if not wait_until(is_over, READY_S, POLL_S):
        names = ", ".join(sorted(missing, key=int))
        raise TimeoutError(
            f"a restart needs all {rank.world_size} ranks; after {READY_S:.0f} s these were not "
            f"ready: {names}; see their logs"
        )
    return not missing


def _touch_progress(run: Run, rank: RankInfo) -> None:
    """Updates the time of the run's progress, so that it does not look stale meanwhile."""
    if not rank.is_first:
        return
    progress = read_record_if_exists(run.paths.progress, Progress)
    if progress and time.time() - progress.updated_at > PROGRESS_S:
        update = {"phase": "starting", "updated_at": time.time()}
        write_record(run.paths.progress, progress.model_copy(update=update))
