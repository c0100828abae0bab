"""Starts of a run's ranks without a supervisor, which are ended at a step that a test chooses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hpcft.config import cluster_profile
from hpcft.core import files
from hpcft.core.paths import RunPaths
from hpcft.jobs import prepare
from hpcft.training.distributed.worker_channel import SAVED_EXIT

RANK = """
import os, sys
from hpcft.training import worker
from hpcft.training.modes import answer_log
from hpcft.training.trainer import checkpointing, save_callback

at, signum, who, moment = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
MOMENTS = {
    "step": (save_callback.Boundary, "on_step_end", lambda self, args, state, *_: state.global_step),
    "save": (checkpointing.SavingTrainer, "_complete", lambda self, underway: underway.record.step),
    "answer": (answer_log.AnswerFile, "add", lambda self, *_: self._stream.tell()),
}
kind, name, reached = MOMENTS[moment]
done = getattr(kind, name)

def method(*arguments, **rest):
    if reached(*arguments) >= at >= 0 and who in ("all", os.environ["SUBMITIT_LOCAL_GLOBALID"]):
        os.kill(os.getpid(), signum)
    return done(*arguments, **rest)

setattr(kind, name, method)
worker.main(*sys.argv[5:])
"""


def made(folder: Path, recipe: Path, *overrides: str) -> Path:
    """A run folder as a submission leaves it, or with a new plan; nothing is started."""
    with patch.object(os, "sched_getaffinity", return_value=range(4)):  # ranks may share a core
        _, (item,) = prepare.prepare_runs(str(recipe), "local", list(overrides))
        site = cluster_profile.load_profile("local").cluster
    files.create_folder(folder)
    paths = RunPaths(folder)
    files.write_record(paths.recipe, item.point.recipe)
    files.write_record(paths.cluster, site)
    files.write_record(paths.plan, item.plan)
    files.write_record(paths.fingerprints, item.fingerprints)
    files.write_record(paths.staged, item.staged)
    return folder


def copied(folder: Path, to: Path) -> Path:
    """A run folder of its own, with all that another one holds."""
    return Path(shutil.copytree(folder, to))


def start(
    folder: Path,
    *,
    at: int = -1,
    signum: signal.Signals = signal.SIGKILL,
    who: str = "all",
    moment: str = "step",
    environment: dict[str, str] | None = None,
) -> list[int]:
    """The exit codes of a run's ranks.

    Args:
        folder: of the run.
        at: step at which they get a signal: at its end, or when its checkpoint is about to be
            published; of prompting the bytes that are answered by then.
        signum: that signal.
        who: the rank that gets it.
        moment: `step`, `save` or `answer`.
        environment: variables beside those of this process.
    """
    plan = json.loads((folder / "plan.json").read_text())
    count = plan["layout"]["nodes"] * plan["layout"]["ranks_per_node"]
    number = len([*(folder / "logs").glob("*.log")])
    (folder / "logs").mkdir(exist_ok=True)
    ranks: list[subprocess.Popen[bytes]] = []
    for rank in range(count):
        variables = {
            **os.environ, **(environment or {}),
            "SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": str(1000 + number),
            "SUBMITIT_LOCAL_NTASKS": str(count), "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_LOCAL_GLOBALID": str(rank), "SUBMITIT_LOCAL_LOCALID": str(rank),
            "SUBMITIT_LOCAL_NODEID": "0", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        log = (folder / f"logs/{number + rank}.log").open("w")
        with log, open(os.devnull, "w") as pipe, open(os.devnull, "w") as stacks:
            passed = (pipe.fileno(), stacks.fileno())  # no supervisor hears of beats or stacks
            command = [at, int(signum), who, moment, folder, 0, os.getpid(), *passed]
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-c", RANK, *map(str, command)],
                    env=variables,
                    stdout=log,
                    stderr=log,
                    pass_fds=passed,
                )
            )
    try:
        while any(rank.poll() is None for rank in ranks):
            if any(rank.poll() not in (None, 0, SAVED_EXIT) for rank in ranks):
                for rank in ranks:  # as its supervisor would
                    rank.kill()
            time.sleep(0.05)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return [rank.returncode for rank in ranks]


def lines(folder: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what is of the clock."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            key: value
            for key, value in line.items()
            if key != "time" and not key.endswith(("_runtime", "_per_second"))
        }
        for line in found
    ]
