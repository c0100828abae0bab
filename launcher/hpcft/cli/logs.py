"""`hpcft logs`: prints the log of a rank."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from hpcft.cli.options import RunName, RunsDir
from hpcft.core.errors import UsageError
from hpcft.core.paths import DEFAULT_RUNS, log_file

POLL_S = 1.0


def logs(
    run: RunName,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Print new lines until the run ends.")
    ] = False,
    rank: Annotated[
        int, typer.Option("--rank", "-r", min=0, metavar="N", help="Number of the rank.")
    ] = 0,
    stderr: Annotated[
        bool, typer.Option("--stderr", help="Print its standard error instead of its output.")
    ] = False,
    runs_dir: RunsDir = DEFAULT_RUNS,
) -> None:
    """Print the log of a rank.

    If RUN names several runs, it is the log of the latest.
    """
    # Imported here, so that `hpcft --help` is quick.
    from hpcft.cli.status import select_runs
    from hpcft.core.run_index import FoundRun
    from hpcft.jobs.status import run_status

    selected = select_runs(runs_dir, [run])
    # Runs whose job record cannot be read come last, but are not the latest.
    latest = ([each for each in selected if each.job.attempts] or selected)[-1]
    run_id = latest.job.run_id
    if not latest.job.attempts and latest.damage:
        raise UsageError(f"{run_id}: its job is not known ({latest.damage}); restore the file")
    if not latest.job_id:
        raise UsageError(f"{run_id} was not queued, so it has no log; see hpcft explain {run_id}")
    folder = Path(latest.job.attempts[-1].logs)
    file = log_file(folder, latest.job_id, rank, "err" if stderr else "out")
    if not file.exists() and not follow:
        names = ", ".join(sorted(p.name for p in folder.glob(f"{latest.job_id}_*_log.*")))
        why = f"the logs of its job are: {names}" if names else "its job has not started"
        raise UsageError(f"{run_id}: rank {rank} has no log; {why}")
    found = FoundRun(latest.paths, latest.job)
    _stream(file, lambda: follow and run_status(found).is_live)


def _stream(file: Path, is_growing: Callable[[], bool]) -> None:
    """Prints a log from its start, and new lines as long as it may grow."""
    from hpcft.cli import console
    from hpcft.core.files import open_file

    position = 0
    while True:
        # Asked before reading: what a run writes just before its end is printed too.
        may_grow = is_growing()
        if file.exists():
            with open_file(file) as stream:
                stream.seek(position)
                for block in iter(lambda: stream.read(1 << 16), b""):
                    console.raw(block)
                position = stream.tell()
        if not may_grow:
            return
        time.sleep(POLL_S)
