"""`hpcft cancel`: cancels queued and running runs."""

from __future__ import annotations

from hpcft.cli.options import RunNames, RunsDir
from hpcft.core.paths import DEFAULT_RUNS


def cancel(runs: RunNames, runs_dir: RunsDir = DEFAULT_RUNS) -> None:
    """Cancel queued and running runs.

    Runs that have ended stay as they are. To continue a cancelled run later: hpcft resume RUN.
    """
    # Imported here, so that `hpcft --help` is quick.
    from hpcft.cli import console
    from hpcft.cli.status import select_runs
    from hpcft.scheduler import scheduler_named

    for run in select_runs(runs_dir, runs):
        name = f"{run.job.recipe}/{run.job.run_id}"
        if not run.may_be_live:
            console.say(f"{name} has ended already: {run.state}")
        elif not run.job_id:
            console.warn(f"{name} was not cancelled, because its job is not known: {run.note}")
        elif scheduler_named(run.job.scheduler).cancel(run.attempt):
            console.say(f"{name} was cancelled (job {run.job_id})")
        else:
            console.say(f"{name} had ended already (job {run.job_id})")
