"""`hpcft calibrate`: lets later plans use what finished runs have measured."""

from __future__ import annotations

from hpcft.cli.options import RunsDir
from hpcft.core.paths import DEFAULT_RUNS


def calibrate(runs_dir: RunsDir = DEFAULT_RUNS) -> None:
    """Let later plans use what finished runs have measured.

    For each GPU, kind of layout and size of model the median of at least three runs replaces the
    value that hpcft states; a recipe whose runs ran out of memory is planned below that. The
    command prints what it learned and from which runs. `hpcft plan --uncalibrated` ignores it, and
    deleting the folder `calibration` in the runs folder undoes it.
    """
    # Imported here, so that `hpcft --help` is quick.
    from hpcft.cli import console
    from hpcft.cli.status import select_runs
    from hpcft.jobs.learn import update_calibration

    lines = update_calibration(select_runs(runs_dir, None), runs_dir)
    for line in lines:
        console.say(line)
    if not lines:
        console.say(f"there are no finished runs in {runs_dir}")
