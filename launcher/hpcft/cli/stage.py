"""`hpcft stage`: model, tokenizer and data into the shared cache, before anything is queued."""

from __future__ import annotations

from typing import Any

import typer

from hpcft.cli.options import ClusterName, Json, Overrides, RecipeNames


def add_to(app: typer.Typer) -> None:
    """Registers the verb."""

    @app.command()
    def stage(
        recipe: RecipeNames,
        cluster: ClusterName = None,
        override: Overrides = None,
        json: Json = False,
    ) -> None:
        """Fetch and check what recipes need of the hub, so that jobs run without network.

        Into the Hugging Face cache (HF_HOME, of the profile or of your environment), which the
        compute nodes have to see. What is there already is kept; an interrupted fetch goes on.
        """
        import os
        import sys

        from hpcft.cli import console
        from hpcft.config import cluster_profile
        from hpcft.config.recipe import load_recipe
        from hpcft.jobs import default_cluster

        points = [point for name in recipe for point in load_recipe(name, override)]
        site = cluster_profile.load_profile(cluster or default_cluster.detect_cluster())
        _set_environment(site.cluster.environment, bars=console.on_terminal(sys.stderr))
        # Only now: the Hugging Face libraries read their settings when they are imported.
        from hpcft.staging import staged_inputs
        from hpcft.staging.stage import stage_inputs

        folder = staged_inputs.hub_folder(os.environ)
        outcomes = stage_inputs(points, folder, console.say, bars=console.on_terminal(sys.stderr))
        if json:
            console.as_json([_as_json(outcome) for outcome in outcomes])
        elif outcomes:
            _show(outcomes)
        else:
            console.say("nothing comes from the hub: model and data are local")


def _set_environment(profile: dict[str, str], *, bars: bool) -> None:
    """Settings of the Hugging Face libraries: the profile's, since jobs read the same cache."""
    import os

    offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")  # meant for the jobs
    os.environ.update(
        {k: v for k, v in profile.items() if k.startswith("HF_") and k not in offline}
    )
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    if not bars:
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"


def _as_json(outcome: Any) -> dict[str, Any]:
    staged = outcome.staged
    return {
        **staged.model_dump(mode="json", exclude={"files"}),
        "files": sorted(staged.files),
        "size_bytes": staged.size_bytes,
        "fetched_bytes": outcome.fetched_bytes,
        "recipes": outcome.recipes,
    }


def _show(outcomes: list[Any]) -> None:
    from hpcft.cli import console
    from hpcft.core.units import format_bytes

    header = ["what", "name", "revision", "commit", "size", "fetched", "recipes"]
    cells = [
        [
            outcome.staged.kind,
            " ".join(filter(None, (outcome.staged.name, outcome.staged.config_name))),
            outcome.staged.revision,
            outcome.staged.commit[:12],
            format_bytes(outcome.staged.size_bytes),
            format_bytes(outcome.fetched_bytes) if outcome.fetched_bytes else "",
            ", ".join(outcome.recipes),
        ]
        for outcome in outcomes
    ]
    console.table(header, cells, right={"size", "fetched"})
