"""`hpcft cancel`: cancels queued and running runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from hpcft.cli.options import RunNames, RunsDir
from hpcft.core.errors import ClusterError
from hpcft.core.paths import DEFAULT_RUNS

if TYPE_CHECKING:
    from hpcft.jobs.status import RunStatus


def cancel(runs: RunNames, runs_dir: RunsDir = DEFAULT_RUNS) -> None:
    """Cancel queued and running runs.

    Runs that have ended stay as they are. To continue a cancelled run later: hpcft resume RUN.
    """
    # Imported here, so that `hpcft --help` is quick.
    from hpcft.cli import console
    from hpcft.cli.status import select_runs
    from hpcft.scheduler import scheduler_named
    from hpcft.scheduler.job_state import UNKNOWN

    live: dict[Literal["slurm", "local"], list[RunStatus]] = {}
    for run in select_runs(runs_dir, runs):
        if not run.may_be_live:
            note = f" ({run.note})" if run.state == UNKNOWN else ""
            console.say(f"{_name(run)} has ended already: {run.state}{note}")
        elif not run.job_id:
            console.warn(
                f"{_name(run)} was not cancelled, because its job is not known: {run.note}"
            )
        else:
            live.setdefault(run.job.scheduler, []).append(run)
    errors: list[str] = []
    for scheduler, selected in live.items():
        ends = scheduler_named(scheduler).cancel([run.attempt for run in selected])
        for run, end in zip(selected, ends, strict=True):
            if isinstance(end, ClusterError):
                errors.append(f"{_name(run)}: {end}")
            elif end:
                console.say(f"{_name(run)} was cancelled (job {run.job_id})")
            else:
                console.say(f"{_name(run)} had ended already (job {run.job_id})")
    if errors:
        raise ClusterError("\n".join(errors))


def _name(run: RunStatus) -> str:
    return f"{run.job.recipe}/{run.job.run_id}"
