"""`hpcft resume`: let runs that have ended go on from their last checkpoint."""

from __future__ import annotations

from typing import Annotated

import typer

from hpcft.cli.options import ClusterName, Json, Overrides, RunsDir
from hpcft.core.paths import DEFAULT_RUNS


def add_to(app: typer.Typer) -> None:
    """Registers the verb."""

    @app.command()
    def resume(
        runs: Annotated[
            list[str],
            typer.Argument(help="Runs, by run id, recipe, sweep or job id.", metavar="RUN…"),
        ],
        cluster: ClusterName = None,
        override: Overrides = None,
        watch: Annotated[bool, typer.Option("--watch", "-w", help="Watch until it ends.")] = False,
        json: Json = False,
        runs_dir: RunsDir = DEFAULT_RUNS,
    ) -> None:
        """Let runs that ended go on from their last checkpoint, also with other resources."""
        from hpcft.cli import console
        from hpcft.cli.status import chosen
        from hpcft.cli.watch import watch_until_done
        from hpcft.core.errors import UsageError
        from hpcft.jobs import submit
        from hpcft.jobs.resume import prepare_resume

        views = chosen(runs_dir, runs)
        left = [view for view in views if override or not (view.is_live or view.record)]
        if not left:
            raise UsageError("all of these runs are queued, running or complete already")
        done = []
        for view in left:
            site, item = prepare_resume(view, cluster, override or [], runs_dir, console.say)
            (entry,) = submit.submit_runs(site, [item], runs_dir, again=False)
            done.append(entry)
            where = f"from step {entry.step}" if entry.step else "from its beginning"
            console.say(f"{view.job.recipe}/{entry.run_id} goes on {where} as job {entry.job_id}")
        if json and not watch:
            console.as_json([{**vars(entry), "folder": str(entry.folder)} for entry in done])
        if watch:
            watch_until_done(runs_dir, [entry.run_id for entry in done])
