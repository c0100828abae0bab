"""`hpcft cancel`: end queued and running runs."""

from __future__ import annotations

from typing import Annotated

import typer

from hpcft.cli.options import RunsDir
from hpcft.core.paths import DEFAULT_RUNS


def add_to(app: typer.Typer) -> None:
    """Registers the verb."""

    @app.command()
    def cancel(
        runs: Annotated[
            list[str],
            typer.Argument(help="Runs, by run id, recipe, sweep or job id.", metavar="RUN…"),
        ],
        runs_dir: RunsDir = DEFAULT_RUNS,
    ) -> None:
        """Cancel runs; what has ended is left alone."""
        from hpcft.cli import console
        from hpcft.cli.status import chosen
        from hpcft.scheduler import local, slurm

        for view in chosen(runs_dir, runs):
            name = f"{view.job.recipe}/{view.job.run_id}"
            if not (view.is_live or view.state == "UNKNOWN") or view.unknown_to_slurm:
                console.say(f"{name} has ended already: {view.state}")
            elif view.job.scheduler == "slurm" and not view.job_id:
                console.warn(f"{name}: whether it is queued is not known yet: {view.note}")
            elif view.job.scheduler == "local":
                ended = local.cancel(view.job.attempts[-1])
                console.say(f"{name} cancelled" if ended else f"{name} had ended already")
            else:
                slurm.cancel(view.job_id)
                console.say(f"{name} cancelled (job {view.job_id})")
