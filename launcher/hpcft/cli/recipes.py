"""`hpcft recipes`: the recipes that travel with hpcft."""

from __future__ import annotations

import typer

from hpcft.cli.options import Json


def add_to(app: typer.Typer) -> None:
    """Registers the verb."""

    @app.command()
    def recipes(json: Json = False) -> None:
        """List the shipped recipes, a line each."""
        from hpcft.cli import console
        from hpcft.config import recipe

        found = [(path, recipe.load_recipe(str(path))[0].recipe) for path in recipe.list_recipes()]
        if json:
            console.as_json([r.model_dump(mode="json") | {"file": str(p)} for p, r in found])
            return
        cells = [[r.name, r.task.name, r.method.name, r.description] for _, r in found]
        console.table(["recipe", "task", "method", "description"], cells)
