"""Starts the ranks of a run without a supervisor, and signals them at a chosen step."""

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
from hpcft.training.trainer.checkpointing import CheckpointingTrainer
from hpcft.training.trainer.save_callback import SaveCallback

at, signum, ranks, moment = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
MOMENTS = {
    "step": (SaveCallback, "on_step_end", lambda self, args, state, *_: state.global_step),
    "save": (CheckpointingTrainer, "_publish", lambda self, pending, *_: pending.record.step),
    "answer": (answer_log.AnswerFile, "add", lambda self, *_: self._stream.tell()),
}
cls, name, progress = MOMENTS[moment]
original = getattr(cls, name)

def method(*arguments, **options):
    if progress(*arguments) >= at >= 0 and ranks in ("all", os.environ["SUBMITIT_LOCAL_GLOBALID"]):
        os.kill(os.getpid(), signum)
    return original(*arguments, **options)

setattr(cls, name, method)
worker.main(*sys.argv[5:])
"""


def make_run(folder: Path, recipe: Path, *overrides: str, cluster: str = "local") -> Path:
    """Writes a run folder as a submission does, or its new plan; starts nothing."""
    # On machines with fewer cores, ranks share them.
    with patch.object(os, "sched_getaffinity", return_value=range(4)):
        _, (item,) = prepare.prepare_runs(
            str(recipe), cluster_name=cluster, overrides=list(overrides)
        )
        site = cluster_profile.load_profile(cluster).cluster
    files.create_folder(folder)
    paths = RunPaths(folder)
    files.write_record(paths.recipe, item.point.recipe)
    files.write_record(paths.cluster, site)
    files.write_record(paths.plan, item.plan)
    files.write_record(paths.fingerprints, item.fingerprints)
    files.write_record(paths.staged, item.staged)
    return folder


def copy_run(folder: Path, target: Path) -> Path:
    """Copies a run folder."""
    return Path(shutil.copytree(folder, target))


def start(
    folder: Path,
    *,
    at: int = -1,
    signum: signal.Signals = signal.SIGKILL,
    ranks: str = "all",
    moment: str = "step",
    environment: dict[str, str] | None = None,
) -> list[int]:
    """Starts the ranks of a run, and returns their exit codes.

    Args:
        folder: the run folder.
        at: when ranks get a signal; negative for never. At the moments `step` and `save` it is an
            optimizer step, at `answer` the size of the answer file in bytes.
        signum: the signal.
        ranks: the rank that gets it, or `all`.
        moment: `step` (at the end of a step), `save` (before a checkpoint is published), or
            `answer` (before a batch of answers is written).
        environment: more environment variables.
    """
    plan = json.loads((folder / "plan.json").read_text())
    count = plan["layout"]["nodes"] * plan["layout"]["ranks_per_node"]
    number = len([*(folder / "logs").glob("*.log")])
    (folder / "logs").mkdir(exist_ok=True)
    processes: list[subprocess.Popen[bytes]] = []
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
            # There is no supervisor to read heartbeats and stacks.
            child_fds = (pipe.fileno(), stacks.fileno())
            command = [at, int(signum), ranks, moment, folder, 0, os.getpid(), *child_fds]
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", RANK, *map(str, command)],
                    env=variables,
                    stdout=log,
                    stderr=log,
                    pass_fds=child_fds,
                )
            )
    try:
        while any(process.poll() is None for process in processes):
            if any(process.poll() not in (None, 0, SAVED_EXIT) for process in processes):
                for process in processes:  # A supervisor would end them too.
                    process.kill()
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [process.returncode for process in processes]


def logged_lines(folder: Path) -> list[dict[str, Any]]:
    """Reads the lines of metrics.jsonl, without times and speeds."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            key: value
            for key, value in line.items()
            if key != "time" and not key.endswith(("_runtime", "_per_second"))
        }
        for line in lines
    ]
