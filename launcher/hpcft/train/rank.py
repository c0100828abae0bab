"""One rank from start to end: whatever happens, it says why and keeps no other rank waiting."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

from hpcft.errors import HpcftError
from hpcft.failures import RankError
from hpcft.paths import RunPaths
from hpcft.recipe import FullRecipe
from hpcft.records import Cluster, Plan
from hpcft.store import check_private, read, write
from hpcft.train import start


def main(run_folder: str) -> None:
    """Runs this process as one rank of the run in `run_folder`."""
    paths = RunPaths(Path(run_folder))
    check_private(paths.folder)
    logging.basicConfig(stream=sys.stdout, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("hpcft").setLevel(logging.INFO)
    me: start.Rank | None = None
    try:
        recipe = read(paths.recipe, FullRecipe)
        plan = read(paths.plan, Plan)
        cluster = read(paths.cluster, Cluster)
        me = start.enter(plan)
        # Deprecations inside the libraries are for their developers, not for this log.
        warnings.filterwarnings("ignore", category=FutureWarning)
        # Imported here: the environment has to be set before torch and transformers are.
        from hpcft.train import loop

        loop.run(paths, recipe, cluster, plan, me)
    except BaseException as error:
        _tell(paths, me, error)
        # An ordinary exit would wait for threads of a communicator whose peers are gone.
        os._exit(1)
    sys.stdout.flush()


def _tell(paths: RunPaths, me: start.Rank | None, error: BaseException) -> None:
    rank = me.rank if me else int(os.environ.get("SLURM_PROCID", "0"))
    traceback.print_exc()
    text = str(error) or type(error).__name__
    record = RankError(
        rank=rank,
        node=me.node if me else os.uname().nodename,
        at=time.time(),
        kind="DataError" if isinstance(error, HpcftError) else type(error).__name__,
        message=text[:20_000],
        traceback="".join(traceback.format_exception(error))[-20_000:],
    )
    try:
        paths.errors.mkdir(mode=0o700, exist_ok=True)
        write(paths.errors / f"{rank}.json", record)
    except OSError:
        pass  # the disk may be what failed; the log has the traceback
    sys.stdout.flush()
    sys.stderr.flush()
