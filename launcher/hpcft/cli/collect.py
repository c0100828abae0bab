"""`hpcft collect`: prints the results table."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from hpcft.cli import completion
from hpcft.cli.options import RunNamesOrAll, RunsDir
from hpcft.core.errors import UsageError
from hpcft.core.paths import DEFAULT_RUNS


def collect(
    runs: RunNamesOrAll = None,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            autocompletion=completion.table_formats,
            metavar="FORMAT",
            help="table, csv, tsv, json, md or latex.",
        ),
    ] = "table",
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", "-m", metavar="NAME", help="Show only these metrics."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    runs_dir: RunsDir = DEFAULT_RUNS,
) -> None:
    """Print the results table.

    Published results stand next to ours, and predictions next to measurements. The command only
    reads: `hpcft calibrate` lets later plans use what the runs have measured.
    """
    # Imported here, so that `hpcft --help` is quick.
    from hpcft.cli import console, results_table
    from hpcft.cli.status import select_runs
    from hpcft.cli.table_formats import FORMATS
    from hpcft.jobs.results import result_rows, row_as_json

    wanted = "json" if json else format
    formats = ["table", "json", *FORMATS]
    if wanted not in formats:
        raise UsageError(f"--format {wanted}: expected one of {', '.join(formats)}")
    statuses = select_runs(runs_dir, runs)
    rows = result_rows(statuses)
    if wanted == "json":
        console.as_json([row_as_json(row) for row in rows])
        return
    if not rows:
        console.say(f"there are no runs in {runs_dir}; to submit one: hpcft submit RECIPE")
        return
    header, cells = results_table.table(rows, metric)
    if wanted in ("md", "latex") or (wanted == "table" and console.on_terminal(sys.stdout)):
        header = results_table.with_arrows(header)
    if wanted == "table":
        console.table(header, cells)
    else:
        console.data(FORMATS[wanted](header, cells))
