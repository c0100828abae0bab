"""`hpcft status`: shows the state, progress and speed of runs."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING

from hpcft.cli.options import Json, RunNamesOrAll, RunsDir, Watch
from hpcft.core.errors import UsageError
from hpcft.core.paths import DEFAULT_RUNS

if TYPE_CHECKING:
    from hpcft.jobs.status import RunStatus


def status(
    runs: RunNamesOrAll = None,
    watch: Watch = False,
    json: Json = False,
    runs_dir: RunsDir = DEFAULT_RUNS,
) -> None:
    """Show the state, progress and speed of runs.

    For the reason of a failure or a wait: hpcft explain RUN.
    """
    # Imported here, so that `hpcft --help` is quick.
    from hpcft.cli import console
    from hpcft.cli.status_table import RIGHT_ALIGNED, table
    from hpcft.cli.watch import watch_until_done
    from hpcft.jobs.status import status_as_json

    statuses = select_runs(runs_dir, runs)
    if watch and statuses:
        watch_until_done(runs_dir, [run.job.run_id for run in statuses])
    elif json:
        console.as_json([status_as_json(run) for run in statuses])
    elif statuses:
        console.table(*table(statuses), right=RIGHT_ALIGNED)
    else:
        console.say(f"there are no runs in {runs_dir}; to submit one: hpcft submit RECIPE")


def select_runs(root: Path, names: list[str] | None) -> list[RunStatus]:
    """Returns the status of the runs that the user names; of all runs if there are no names.

    Warns of folders that cannot be listed.

    Args:
        root: the runs folder.
        names: run ids, recipes, sweeps, job ids or run folders.

    Raises:
        UsageError: no run has one of the names.
    """
    from hpcft.cli import console
    from hpcft.core.run_index import FoundRun, find_runs, list_runs
    from hpcft.jobs.status import run_statuses

    # The records of thousands of runs are no garbage, and the collector would look for cycles among
    # them again and again: a tenth of the time.
    gc.set_threshold(1_000_000)
    warnings: dict[str, None] = {}  # Several names look into the same folders: warn once.
    try:
        if not names:
            return run_statuses(list_runs(root, warnings.setdefault))
        selected: dict[Path, FoundRun] = {}
        for name in names:
            matches = find_runs(root, name, warnings.setdefault)
            if not matches:
                raise UsageError(f"there is no run {name!r} in {root}; to list all: hpcft status")
            selected |= {run.paths.folder: run for run in matches}
        return run_statuses(selected.values())
    finally:
        for warning in warnings:
            console.warn(warning)
