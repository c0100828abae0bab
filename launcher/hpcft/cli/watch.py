"""Watches runs: a live table on a terminal, a line for each change in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hpcft.cli import console
from hpcft.cli.status_table import COLUMNS, DROPPED_FIRST, RIGHT_ALIGNED, done_share, table
from hpcft.core.errors import RunFailed
from hpcft.core.run_index import list_runs
from hpcft.jobs.status import RunStatus, run_statuses

LOCAL_INTERVAL_S = 2.0
"""Seconds between two looks at runs of this machine."""
MIN_INTERVAL_S, MAX_INTERVAL_S = 5.0, 60.0
"""Fewest and most seconds between two looks at runs of a cluster."""
RUNS_PER_S = 20
"""Live runs for which a second is added to the interval."""
UNKNOWN_TIMEOUT_S = 900.0
"""Seconds to wait for a scheduler that does not answer; its jobs continue in the meantime."""


def watch_until_done(root: Path, run_ids: list[str]) -> None:
    """Shows runs until none of them is queued or running.

    Raises:
        RunFailed: at least one run ended without a result.
    """
    from rich.live import Live  # It is costly to import.

    wanted = set(run_ids)
    unknown_since: float | None = None
    shown: dict[str, str] = {}
    is_drawn = console.on_terminal(sys.stderr)
    live = Live(console=console.stderr_console(), auto_refresh=False) if is_drawn else None
    try:
        if live:
            live.start()
        while True:
            runs = _read(root, wanted)
            if live:
                drawn = console.rich_table(*table(runs), right=RIGHT_ALIGNED, drop=DROPPED_FIRST)
                live.update(drawn, refresh=True)
            else:
                _say_changes(runs, shown)
            if not any(run.state == "UNKNOWN" for run in runs):
                unknown_since = None
            elif unknown_since is None:
                unknown_since = time.monotonic()
            unknown_s = time.monotonic() - unknown_since if unknown_since else 0.0
            if unknown_s > UNKNOWN_TIMEOUT_S or not any(_is_awaited(run) for run in runs):
                break
            time.sleep(interval_s(runs))
    except KeyboardInterrupt:
        console.say("stopped watching; the runs continue (see hpcft status, hpcft cancel)")
        raise
    finally:
        if live:
            live.stop()
    _raise_for_failures(runs, wanted)


def interval_s(runs: Sequence[RunStatus]) -> float:
    """Returns the seconds to wait before the next look at runs: 10 for ten live runs or more.

    Each look is a squeue of all of the user's jobs, during which the controller schedules nothing;
    Slurm's manual page of squeue advises against loops of such calls.
    """
    live = [run for run in runs if run.is_live]
    if live and all(run.job.scheduler == "local" for run in live):
        return LOCAL_INTERVAL_S
    least_s = MIN_INTERVAL_S if len(live) < 10 else 2 * MIN_INTERVAL_S
    return min(max(least_s, len(live) / RUNS_PER_S), MAX_INTERVAL_S)


def _read(root: Path, run_ids: set[str]) -> list[RunStatus]:
    return run_statuses(run for run in list_runs(root) if run.job.run_id in run_ids)


def _is_awaited(run: RunStatus) -> bool:
    """Returns whether to keep watching a run: it is alive, or the scheduler does not answer."""
    return run.is_live or (run.state == "UNKNOWN" and not run.damage)


def _raise_for_failures(runs: list[RunStatus], run_ids: set[str]) -> None:
    failures = [
        f"{run.job.run_id} {run.state}: {run.note}" for run in runs if run.state != "COMPLETED"
    ]
    missing = run_ids - {run.job.run_id for run in runs}
    failures += [f"{run_id}: its folder is gone from the runs folder" for run_id in sorted(missing)]
    if failures:
        raise RunFailed("\n".join(failures))


def _say_changes(runs: list[RunStatus], shown: dict[str, str]) -> None:
    """Prints a line for each run that has changed its state or phase, or done a tenth more.

    Args:
        runs: the runs now.
        shown: what was printed last, by run id; updated here.
    """
    for run in runs:
        phase = run.progress.phase if run.progress else ""
        tenth = int(10 * (done_share(run) or 0.0))
        change = f"{run.state} {phase} {tenth}"
        if shown.get(run.job.run_id) == change:
            continue
        shown[run.job.run_id] = change
        parts = [c.cell(run) for c in COLUMNS if c.title not in ("cluster", "note")]
        parts.append(phase if phase and run.is_live else run.note)
        console.say("  ".join(part for part in parts if part))
