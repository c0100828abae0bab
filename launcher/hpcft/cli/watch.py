"""Watching runs: a live table on a terminal, a line for each change in a pipe."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from hpcft.cli.status_table import COLUMNS
from hpcft.core.errors import RunFailed
from hpcft.jobs.status import RunStatus

INTERVAL_S = 2.0
# An unreachable scheduler is waited for; its jobs go on without us.
UNKNOWN_PATIENCE_S = 900.0


def cells(views: list[RunStatus]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the status table."""
    return [c.title for c in COLUMNS], [[c.cell(v) for c in COLUMNS] for v in views]


# What a live table does without on a narrow terminal, the least missed first.
DROP = ("nodes", "cluster", "job", "memory (peak)", "elapsed", "tokens/s", "point", "step", "note")
RIGHT = {column.title for column in COLUMNS if column.right}


def watch_until_done(root: Path, run_ids: list[str]) -> None:
    """Shows the runs until none is queued or running.

    Raises:
        RunFailed: at least one ended without a result.
    """
    from rich.live import Live

    from hpcft.cli import console
    from hpcft.core.run_index import list_runs
    from hpcft.jobs.status import run_statuses

    wanted = set(run_ids)
    unknown_since: float | None = None
    said: dict[str, str] = {}
    drawn = console.on_terminal(sys.stderr)
    live = Live(console=console.talk(), auto_refresh=False) if drawn else None
    try:
        if live:
            live.start()
        while True:
            views = run_statuses((p, j) for p, j in list_runs(root) if j.run_id in wanted)
            if live:
                live.update(console.rich_table(*cells(views), right=RIGHT, drop=DROP), refresh=True)
            else:
                _say_changes(views, said)
            unknown = [v for v in views if v.state == "UNKNOWN"]
            if not unknown:
                unknown_since = None
            elif unknown_since is None:
                unknown_since = time.monotonic()
            gave_up = unknown_since and time.monotonic() - unknown_since > UNKNOWN_PATIENCE_S
            if gave_up or not any(v.is_live or v.state == "UNKNOWN" for v in views):
                break
            time.sleep(INTERVAL_S)
    except KeyboardInterrupt:
        console.say("stopped watching; the runs go on: hpcft status, hpcft cancel")
        raise
    finally:
        if live:
            live.stop()
    bad = [f"{v.job.run_id} {v.state}: {v.note}" for v in views if v.state != "COMPLETED"]
    lost = wanted - {view.job.run_id for view in views}
    bad += [f"{run_id}: its folder is gone, or damaged: hpcft status" for run_id in sorted(lost)]
    if bad:
        raise RunFailed("\n".join(bad))


def _say_changes(views: list[RunStatus], said: dict[str, str]) -> None:
    from hpcft.cli import console

    for view in views:
        p = view.progress
        tenth = int(10 * p.step / p.total_steps) if p and p.total_steps else -1
        key = f"{view.state} {p.phase if p else ''} {tenth}"
        if said.get(view.job.run_id) == key:
            continue
        said[view.job.run_id] = key
        parts = [c.cell(view) for c in COLUMNS if c.title not in ("cluster", "note")]
        parts.append(p.phase if p and view.is_live else view.note)
        console.say("  ".join(part for part in parts if part))
