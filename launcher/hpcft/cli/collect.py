"""`hpcft collect`: the results table."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from hpcft.cli.options import RunNames, RunsDir
from hpcft.core.errors import StoreError, UsageError
from hpcft.core.paths import DEFAULT_RUNS


def add_to(app: typer.Typer) -> None:
    """Registers the verb."""

    @app.command()
    def collect(
        runs: RunNames = None,
        format: Annotated[
            str, typer.Option("--format", help="table, csv, tsv, json, md or latex.")
        ] = "table",
        metric: Annotated[
            list[str] | None, typer.Option("--metric", "-m", help="Show these metrics.")
        ] = None,
        json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
        runs_dir: RunsDir = DEFAULT_RUNS,
    ) -> None:
        """Print one table of results, reported beside ours; of all runs, keep what they measured.

        Later plans go by the measured memory and speed of the runs of their cluster.
        """
        from hpcft.cli import console, results_table
        from hpcft.cli.status import chosen
        from hpcft.cli.table_formats import FORMATS
        from hpcft.jobs import learn, results

        wanted = "json" if json else format
        if wanted not in ("table", "json", *FORMATS):
            known = ", ".join(["table", "json", *FORMATS])
            raise UsageError(f"--format {wanted}: expected one of {known}")
        views = chosen(runs_dir, runs)
        if not runs:
            try:
                for line in learn.update_calibration(views, runs_dir):
                    console.say(line)
            except (StoreError, OSError) as error:
                console.warn(f"the calibration is not kept: {error}")
        found = results.result_rows(views)
        if wanted == "json":
            console.as_json([results.row_as_json(row) for row in found])
            return
        if not found:
            console.say(f"no runs in {runs_dir}")
            return
        header, cells = results_table.table(found, metric)
        if wanted in ("md", "latex") or (wanted == "table" and console.on_terminal(sys.stdout)):
            header = results_table.with_arrows(header)
        if wanted == "table":
            console.table(header, cells)
        else:
            console.data(FORMATS[wanted](header, cells))
