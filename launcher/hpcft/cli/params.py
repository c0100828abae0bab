"""`hpcft params`: what a recipe's model holds and trains, part by part."""

from __future__ import annotations

import typer

from hpcft.cli.options import Json, Overrides, RecipeName


def add_to(app: typer.Typer) -> None:
    """Registers the verb."""

    @app.command()
    def params(recipe: RecipeName, override: Overrides = None, json: Json = False) -> None:
        """Show the parameters of a recipe's model, without its weights."""
        from hpcft.cli import console
        from hpcft.config.recipe import load_recipe
        from hpcft.config.sweep import format_point
        from hpcft.planning import parameter_table

        points = load_recipe(recipe, override)
        tables = []
        for point in points:
            parts = point.recipe
            groups = parameter_table.module_groups(parts.model, parts.task, parts.method)
            tables.append([*groups, parameter_table.total(groups)])
        if json:
            found = [[group.model_dump() for group in table] for table in tables]
            console.as_json(found[0] if len(found) == 1 else found)
            return
        numbers = ["total", "trainable", "frozen", "added"]
        for point, table in zip(points, tables, strict=True):
            if point.values:
                console.say(format_point(point.values))
            cells = [[g.name, *(f"{getattr(g, n):,}" for n in numbers)] for g in table]
            console.table(["module", *numbers], cells, right={*numbers})
