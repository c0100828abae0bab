"""`hpcft schema`: prints the JSON Schema or the reference page of recipes or profiles."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Kind(StrEnum):
    """A kind of file that people write."""

    recipe = "recipe"
    cluster = "cluster"


def schema(
    kind: Annotated[Kind, typer.Argument(help="The kind of file.")] = Kind.recipe,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print a reference page instead.")
    ] = False,
) -> None:
    """Print the JSON Schema of recipes or profiles.

    Editors with YAML support complete and check files with it.
    """
    # Imported here, so that `hpcft --help` is quick.
    from hpcft.cli import console
    from hpcft.config.schema import json_schema, reference_page

    if markdown:
        console.data(reference_page(kind.value))
    else:
        console.as_json(json_schema(kind.value))
