"""`hpcft schema`: the JSON Schema of recipes and profiles, or the reference page."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Kind(StrEnum):
    """What is described."""

    recipe = "recipe"
    cluster = "cluster"


def add_to(app: typer.Typer) -> None:
    """Registers the verb."""

    @app.command()
    def schema(
        kind: Annotated[Kind, typer.Argument(help="recipe or cluster")] = Kind.recipe,
        markdown: Annotated[
            bool, typer.Option("--markdown", help="A reference page instead of JSON Schema.")
        ] = False,
    ) -> None:
        """Print the JSON Schema, with which editors complete and check."""
        from hpcft.cli import console
        from hpcft.config.schema import json_schema, reference_page

        if markdown:
            console.data(reference_page(kind.value))
        else:
            console.as_json(json_schema(kind.value))
