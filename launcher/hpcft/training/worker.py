"""One rank from start to end: whatever happens, it says why and keeps no other rank waiting.

Its supervisor starts it as `python -m hpcft.training.worker FOLDER GENERATION SUPERVISOR PIPE STACKS`.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from hpcft.core.errors import HpcftError
from hpcft.core.files import check_private, read_record
from hpcft.core.paths import RunPaths
from hpcft.core.records import Cluster, Plan
from hpcft.recovery.diagnosis import RankError, write_rank_error
from hpcft.recovery.log import FRAGMENTATION, current_plan
from hpcft.staging.staged_inputs import load_run_recipe
from hpcft.tasks.few_shot.task import FewShot
from hpcft.training.distributed import gpu_memory, rank_env, stop_signal, worker_channel
from hpcft.training.distributed.worker_channel import OUT_OF_MEMORY_EXIT, SAVED_EXIT

if TYPE_CHECKING:
    from hpcft.training.telemetry.progress import ProgressReporter

ELSEWHERE = (
    "a smaller batch would not help: take a GPU that nobody else uses (another node, an exclusive "
    "job), or plan with --other-processes"
)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(run_folder: str, generation: str, supervisor: str, pipe: str, stacks: str) -> None:
    """Runs this process as one rank of the run in `run_folder`."""
    stop_signal.install()
    _end_with(int(supervisor))
    beating = worker_channel.connect(int(pipe), int(stacks))
    paths = RunPaths(Path(run_folder))
    check_private(paths.folder)
    logging.basicConfig(stream=sys.stdout, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("hpcft").setLevel(logging.INFO)
    me: rank_env.RankInfo | None = None
    heartbeat: ProgressReporter | None = None
    plan: Plan | None = None
    try:
        recipe = load_run_recipe(paths)
        cluster = read_record(paths.cluster, Cluster)
        plan = current_plan(paths, recipe, cluster)
        me = rank_env.init_rank_env(plan)
        # Deprecations inside the libraries are for their developers, not for this log.
        warnings.filterwarnings("ignore", category=FutureWarning)
        # Imported here: the environment has to be set before torch and transformers are.
        from hpcft.training.telemetry.progress import ProgressReporter

        heartbeat = ProgressReporter(paths, me, int(generation), beating)
        if isinstance(recipe.task, FewShot):
            from hpcft.training.modes.few_shot import run_few_shot as run
        elif recipe.method.trains:
            from hpcft.training.modes.finetune import run_finetuning as run
        else:
            from hpcft.training.modes.evaluate import run_evaluation as run
        run(paths, recipe, cluster, plan, heartbeat, int(generation))
    except stop_signal.StoppedAfterSave:
        sys.stdout.flush()
        os._exit(SAVED_EXIT)
    except BaseException as error:
        # Frames hold tensors: what is left to do needs a little of their memory.
        traceback.clear_frames(error.__traceback__)
        code = _tell(paths, me, plan, error, heartbeat.progress.phase if heartbeat else "starting")
        # An ordinary exit would wait for threads of a communicator whose peers are gone.
        os._exit(code)
    sys.stdout.flush()


def _end_with(supervisor: int) -> None:
    """Lets the kernel end this process with its supervisor, however that one ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor:
        os._exit(1)  # it was gone before


def _tell(
    paths: RunPaths,
    me: rank_env.RankInfo | None,
    plan: Plan | None,
    error: BaseException,
    phase: str,
) -> int:
    """Writes why this rank ends; the exit code to end with."""
    short = gpu_memory.out_of_memory_of(error, plan) if plan else None
    answerable = bool(plan and short and gpu_memory.can_fall_back(short, plan))
    # Of what the ladder may answer the error log is silent: it is no failure yet.
    traceback.print_exception(error, file=sys.stdout if answerable else sys.stderr)
    record = RankError(
        rank=me.rank if me else int(os.environ.get("SLURM_PROCID", "0")),
        node=me.node if me else os.uname().nodename,
        at=time.time(),
        kind="DataError" if isinstance(error, HpcftError) else type(error).__name__,
        message=(str(error) or type(error).__name__)[:20_000],
        job_id=me.job_id if me else "",
        phase=phase,
        traceback="".join(traceback.format_exception(error))[-20_000:],
    )
    if short:
        judged = {"message": short.evidence}
        if short.foreign:
            judged = {"message": short.foreign, "failure": "foreign_memory", "next_step": ELSEWHERE}
        elif short.fragmented and not gpu_memory.segments_expandable():
            judged["failure"] = FRAGMENTATION
        record = record.model_copy(update=judged)
    write_rank_error(paths, record)
    sys.stdout.flush()
    sys.stderr.flush()
    return OUT_OF_MEMORY_EXIT if answerable else 1


if __name__ == "__main__":
    main(*sys.argv[1:])
