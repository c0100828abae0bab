"""`hpcft params`: counts the parameters of a recipe's model, module by module."""

from __future__ import annotations

from hpcft.cli.options import Json, Overrides, RecipeName


def params(recipe: RecipeName, override: Overrides = None, json: Json = False) -> None:
    """Count the parameters of a recipe's model.

    The table has a row for each module. The model is built without its weights, so that nothing
    large is loaded.
    """
    # Imported here, so that `hpcft --help` is quick.
    from hpcft.cli import console
    from hpcft.config.recipe import load_recipe
    from hpcft.config.sweep import format_point
    from hpcft.planning.parameter_table import module_groups, sum_groups

    points = load_recipe(recipe, override)
    tables = []
    for point in points:
        groups = module_groups(point.recipe.model, point.recipe.task, point.recipe.method)
        tables.append([*groups, sum_groups(groups)])
    if json:
        counts = [[group.model_dump() for group in table] for table in tables]
        console.as_json(counts[0] if len(counts) == 1 else counts)
        return
    numbers = ["total", "trainable", "frozen", "added"]
    for point, table in zip(points, tables, strict=True):
        if point.values:
            console.say(format_point(point.values))
        cells = [[g.name, *(f"{getattr(g, name):,}" for name in numbers)] for g in table]
        console.table(["module", *numbers], cells, right={*numbers})
