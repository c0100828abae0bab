"""`hpcft recipes`: lists the recipes that come with hpcft."""

from __future__ import annotations

from hpcft.cli.options import Json


def recipes(json: Json = False) -> None:
    """List the shipped recipes.

    A recipe of your own can begin with `extends: NAME` and change single fields.
    """
    # Imported here, so that `hpcft --help` is quick.
    from hpcft.cli import console
    from hpcft.config.recipe import list_recipes, load_recipe

    shipped = [(path, load_recipe(str(path))[0].recipe) for path in list_recipes()]
    if json:
        console.as_json([r.model_dump(mode="json") | {"file": str(path)} for path, r in shipped])
        return
    cells = [[r.name, r.task.name, r.method.name, r.description] for _, r in shipped]
    console.table(["recipe", "task", "method", "description"], cells)
