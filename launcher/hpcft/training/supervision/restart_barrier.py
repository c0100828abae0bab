"""How the supervisors of a run agree before their children start: they meet in its folder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from hpcft.config.recipe_types import FullRecipe
from hpcft.core.files import read_record_if_exists, write_record
from hpcft.core.paths import RunPaths
from hpcft.core.records import Cluster, Progress
from hpcft.recovery import limits, log
from hpcft.recovery.diagnosis import RankError, write_rank_error
from hpcft.scheduler import slurm
from hpcft.training.distributed import rendezvous
from hpcft.training.distributed.rank_env import RankInfo

POLL_S = 0.2
# Until all ranks are ready to start again.
READY_S = 300.0
# Between two heartbeats while nothing trains.
BEAT_S = 1.0
STARTED_AGAIN = "Slurm started the job again (preemption without notice, a failed node, or by hand)"


def record_slurm_restart(
    paths: RunPaths, me: RankInfo, recipe: FullRecipe, cluster: Cluster, is_told: Callable[[], bool]
) -> bool:
    """Notes that Slurm has started the job again by itself; whether it may go on.

    Rank 0 does so and the others wait for it, since all go by the number of recoveries.

    Args:
        paths: the run.
        me: this rank.
        recipe: of the run.
        cluster: of the run.
        is_told: whether this rank was told to end.
    """
    restart = slurm.restart_count()
    if not restart or _is_noted(paths, me, restart):
        return True
    if not me.is_first:
        deadline = time.monotonic() + READY_S
        while not _is_noted(paths, me, restart):
            if time.monotonic() > deadline or is_told():
                return False  # rank 0 says why
            time.sleep(POLL_S)
        return True
    error = RankError(
        rank=me.rank,
        node=me.node,
        at=time.time(),
        kind="Interrupted",
        message=STARTED_AGAIN,
        job_id=me.job_id,
    )
    taken = log.read_recoveries(paths)
    step = log.saved_step(paths)
    if obstacle := limits.restart_limit_reason(taken, "interrupted", step):
        update = {"failure": "stuck", "message": f"{STARTED_AGAIN}; {obstacle}"}
        write_rank_error(paths, error.model_copy(update=update))
        return False
    plan = log.current_plan(paths, recipe, cluster)
    log.append_recovery(
        paths, plan, plan, number=len(taken) + 1, action="requeue", who=error,
        cause="interrupted", step=step, restart=restart,
    )  # fmt: skip
    return True


def _is_noted(paths: RunPaths, me: RankInfo, restart: int) -> bool:
    return any(
        (recovery.action, recovery.job_id, recovery.restart) == ("requeue", me.job_id, restart)
        for recovery in log.read_recoveries(paths)
    )


def wait_for_all_ranks(
    paths: RunPaths, me: RankInfo, generation: int, is_told: Callable[[], bool]
) -> None:
    """Waits until every rank has ended its child and is ready for this generation.

    Raises:
        TimeoutError: some did not come.
    """
    folder = rendezvous.rendezvous_file(paths, me, generation).with_suffix("")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / str(me.rank)).touch()
    deadline = time.monotonic() + READY_S
    while missing := set(map(str, range(me.world_size))) - set(os.listdir(folder)):
        if time.monotonic() > deadline or is_told():
            absent = ", ".join(sorted(missing, key=int))
            raise TimeoutError(
                f"to start again all {me.world_size} ranks have to be ready; after "
                f"{READY_S:.0f} s these were not: {absent}; see their logs"
            )
        _beat(paths, me)
        time.sleep(POLL_S)
    _beat(paths, me)


def _beat(paths: RunPaths, me: RankInfo) -> None:
    """Keeps the heartbeat of rank 0 from looking dead while nothing trains."""
    if not me.is_first:
        return
    progress = read_record_if_exists(paths.progress, Progress)
    if progress and time.time() - progress.updated_at > BEAT_S:
        now = {"phase": "starting", "updated_at": time.time()}
        write_record(paths.progress, progress.model_copy(update=now))
