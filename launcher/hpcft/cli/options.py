"""The arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hpcft.cli import completion

RunsDir = Annotated[
    Path,
    typer.Option(
        "--runs-dir", envvar="HPCFT_RUNS_DIR", metavar="FOLDER", help="Folder of all runs.",
        show_default="./runs",
    ),
]  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
ClusterName = Annotated[
    str | None,
    typer.Option(
        "--cluster", "-c", envvar="HPCFT_CLUSTER", metavar="PROFILE",
        autocompletion=completion.profiles,
        help="Cluster profile: a name from `hpcft clusters`, or a file. Default: a profile for the "
        "Slurm of this machine, or `local` without Slurm.",
    ),
]  # fmt: skip
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--override", "-o", metavar="FIELD=VALUE",
        help="Change a field of the recipe, for example train.learning_rate=1e-4.",
    ),
]  # fmt: skip
RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", autocompletion=completion.recipes,
        help="Recipe: a file, or a name from `hpcft recipes`.",
    ),
]  # fmt: skip
RecipeNames = Annotated[
    list[str],
    typer.Argument(
        metavar="RECIPE", autocompletion=completion.recipes,
        help="Recipes: files, or names from `hpcft recipes`.",
    ),
]  # fmt: skip
Uncalibrated = Annotated[
    bool,
    typer.Option(
        "--uncalibrated", help="Ignore what earlier runs on the cluster have measured."
    ),
]  # fmt: skip
Watch = Annotated[
    bool,
    typer.Option("--watch", "-w", help="Show the runs until all have ended."),
]

_HOW_TO_NAME = "by run id, recipe, sweep or job id"
RunName = Annotated[
    str,
    typer.Argument(
        metavar="RUN", autocompletion=completion.runs, help=f"The run, {_HOW_TO_NAME}."
    ),
]  # fmt: skip
RunNames = Annotated[
    list[str],
    typer.Argument(metavar="RUN", autocompletion=completion.runs, help=f"Runs, {_HOW_TO_NAME}."),
]
RunNamesOrAll = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RUN", autocompletion=completion.runs,
        help=f"Runs, {_HOW_TO_NAME}. Default: all.",
    ),
]  # fmt: skip
