"""Arguments and options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunsDir = Annotated[
    Path,
    typer.Option(
        "--runs-dir", envvar="HPCFT_RUNS_DIR", help="Folder of all runs.", show_default="./runs"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
ClusterName = Annotated[
    str | None,
    typer.Option(
        "--cluster", "-c", envvar="HPCFT_CLUSTER",
        help="Profile: a name from `hpcft clusters`, or a file. Default: the Slurm that is here, "
        "else local.",
    ),
]  # fmt: skip
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--override", "-o", help="Change a field: train.learning_rate=1e-4", metavar="K=V"
    ),
]
RecipeName = Annotated[
    str, typer.Argument(help="Recipe: a file, or a name from `hpcft recipes`.", metavar="RECIPE")
]
RecipeNames = Annotated[
    list[str],
    typer.Argument(help="Recipes: files, or names from `hpcft recipes`.", metavar="RECIPE…"),
]
Uncalibrated = Annotated[
    bool,
    typer.Option("--uncalibrated", help="Without what earlier runs of the cluster have measured."),
]
RunNames = Annotated[
    list[str] | None,
    typer.Argument(
        help="Runs, by run id, recipe, sweep or job id. Default: all.", metavar="[RUN]…"
    ),
]
