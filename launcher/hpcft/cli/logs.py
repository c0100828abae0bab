"""`hpcft logs`: what a rank of a run printed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from hpcft.cli.options import RunsDir
from hpcft.core.errors import UsageError
from hpcft.core.paths import DEFAULT_RUNS, log_file


def add_to(app: typer.Typer) -> None:
    """Registers the verb."""

    @app.command()
    def logs(
        run: Annotated[str, typer.Argument(help="Run id, recipe or job id.", metavar="RUN")],
        follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on printing.")] = False,
        rank: Annotated[int, typer.Option("--rank", "-r", min=0, help="Which rank.")] = 0,
        stderr: Annotated[bool, typer.Option("--stderr", help="Its error stream.")] = False,
        runs_dir: RunsDir = DEFAULT_RUNS,
    ) -> None:
        """Print what a rank of a run wrote."""
        from hpcft.cli.status import chosen
        from hpcft.jobs.status import run_status

        view = chosen(runs_dir, [run])[-1]
        attempt = view.job.attempts[-1] if view.job.attempts else None
        if attempt is None or not view.job_id:
            raise UsageError(f"{view.job.run_id}: was not queued, there is no log")
        file = log_file(Path(attempt.logs), view.job_id, rank, "err" if stderr else "out")
        if not file.exists() and not follow:
            others = sorted(p.name for p in Path(attempt.logs).glob(f"{view.job_id}_*_log.*"))
            known = f"; there are: {', '.join(others)}" if others else "; it has not started"
            raise UsageError(f"{view.job.run_id}: rank {rank} has no log{known}")
        _stream(file, lambda: follow and run_status(view.paths, view.job).is_live)


def _stream(file: Path, more: object) -> None:
    """Prints a log from its start, and what is added while `more()` says so."""
    from hpcft.cli import console
    from hpcft.core.files import open_file

    assert callable(more)
    position = 0
    while True:
        on_resume = more()
        if file.exists():
            with open_file(file) as stream:
                stream.seek(position)
                for block in iter(lambda: stream.read(1 << 16), b""):
                    console.raw(block)
                position = stream.tell()
        if not on_resume:
            return
        time.sleep(1.0)
