"""`hpcft status`: what is known of each run now."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpcft.cli.options import Json, RunNames, RunsDir
from hpcft.core.errors import UsageError
from hpcft.core.paths import DEFAULT_RUNS

if TYPE_CHECKING:  # `hpcft --help` reads this file: what is costly to import waits
    from hpcft.core.paths import RunPaths
    from hpcft.core.records import Job
    from hpcft.jobs.status import RunStatus


def add_to(app: typer.Typer) -> None:
    """Registers the verb."""

    @app.command()
    def status(
        runs: RunNames = None,
        watch: Annotated[bool, typer.Option("--watch", "-w", help="Watch until all end.")] = False,
        json: Json = False,
        runs_dir: RunsDir = DEFAULT_RUNS,
    ) -> None:
        """Show state, progress and speed of runs."""
        from hpcft.cli import console
        from hpcft.cli.watch import RIGHT, cells, watch_until_done
        from hpcft.jobs.status import status_as_json

        views = chosen(runs_dir, runs)
        if watch and views:
            watch_until_done(runs_dir, [view.job.run_id for view in views])
        elif json:
            console.as_json([status_as_json(view) for view in views])
        elif views:
            console.table(*cells(views), right=RIGHT)
        else:
            console.say(f"no runs in {runs_dir}")


def chosen(root: Path, names: list[str] | None) -> list[RunStatus]:
    """The runs that the user names; all of them without a name. Of damaged ones it warns.

    Raises:
        UsageError: a name matches nothing.
    """
    from hpcft.cli import console
    from hpcft.jobs.status import run_statuses

    damaged: dict[str, None] = {}
    try:
        return run_statuses(_named(root, names, damaged.setdefault))
    finally:
        for line in damaged:
            console.warn(line)


def _named(
    root: Path, names: list[str] | None, damaged: Callable[[str], None]
) -> Iterable[tuple[RunPaths, Job]]:
    from hpcft.core.run_index import find_runs, list_runs

    if not names:
        return list_runs(root, damaged)
    found: dict[Path, tuple[RunPaths, Job]] = {}
    for name in names:
        matches = find_runs(root, name, damaged)
        if not matches:
            raise UsageError(f"no run {name!r} in {root}; hpcft status lists them")
        found |= {paths.folder: (paths, job) for paths, job in matches}
    return found.values()
